#!/bin/bash
# Carry the packages for gpu_check.py to a machine that has torch and a GPU but no network.
#
#   benchmarks/gpu_carry.sh pack DIR [PYTHON]   here: fetch wheels for that Python (default 3.12) into parts of 60 MiB
#   benchmarks/gpu_carry.sh unpack DIR          there, with the parts in DIR: join them and install, dependencies left out
#
# The parts are named part_aa, part_ab, ... They may arrive in any order. unpack reports a wrong checksum.
set -euo pipefail
command=${1:?pack or unpack} dir=${2:?a folder} python=${3:-3.12}
here=$(cd "$(dirname "$0")/.." && pwd)

# DALI with its decoders, then small Python packages.
wheels=(
  nvidia-dali-cuda130 nvidia-nvimgcodec-cu13 nvidia-libnvcomp-cu13 nvidia-nvjpeg nvidia-nvjpeg2k-cu13 nvidia-nvtiff-cu13
  omegaconf antlr4-python3-runtime pyyaml rich markdown-it-py mdurl pygments pillow psutil safetensors tensorboard absl-py
  markdown werkzeug markupsafe grpcio protobuf tensorboard-data-server packaging six makefun gast astunparse optree nvtx
  libcst matplotlib contourpy cycler fonttools kiwisolver pyparsing python-dateutil
)

case $command in
  pack)
    mkdir -p "$dir/wheels"
    for name in "${wheels[@]}"; do
      wanted=$(grep -i "^$name==" "$here/constraints.txt" || true)
      [[ -n $wanted ]] || continue # not in the pinned set
      pip download --quiet --no-deps --only-binary=:all: --python-version "$python" --dest "$dir/wheels" "$wanted"
    done
    tar -C "$dir" -cf "$dir/wheels.tar" wheels
    (cd "$dir" && sha256sum wheels.tar >wheels.sha256)
    split --bytes=60M "$dir/wheels.tar" "$dir/part_"
    rm -r "$dir/wheels" "$dir/wheels.tar"
    ls -l "$dir"
    ;;
  unpack)
    cat "$dir"/part_* >"$dir/wheels.tar"
    (cd "$dir" && sha256sum --check --quiet wheels.sha256)
    tar -C "$dir" -xf "$dir/wheels.tar"
    pip install --quiet --no-index --no-deps "$dir"/wheels/*.whl
    ;;
  *)
    echo "error: $command is neither pack nor unpack" >&2
    exit 2
    ;;
esac
