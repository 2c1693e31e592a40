"""Predict on your own images: ``python -m mtunet_dist.predict RUN_OR_CHECKPOINT IMAGE... --out FOLDER``.

For each image STEM it writes a file per task and a picture, at the image's own size, turned upright by its EXIF
orientation: ``STEM.label.png`` (8-bit class indices), ``STEM.depth.png`` (16-bit, in the stored units of the training
set), ``STEM.normal.png`` and ``STEM.preview.png``. It needs only the checkpoint, not the dataset.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.markup import escape
from rich.progress import track
from torch import Tensor

from mtunet_dist import distributed
from mtunet_dist.core.step import MultiTaskStep
from mtunet_dist.data.info import DatasetInfo
from mtunet_dist.errors import InputError
from mtunet_dist.runs import pictures
from mtunet_dist.runs.loading import load_run, load_step
from mtunet_dist.sources._images import RGB, decode, resize_rgb
from mtunet_dist.sources.folder import check_outside
from mtunet_dist.system import arguments
from mtunet_dist.system.command import command
from mtunet_dist.system.files import entries, read_bytes

SUFFIXES = (".png", ".jpg", ".jpeg")


def predict(step: MultiTaskStep, info: DatasetInfo, rgb: np.ndarray, device: torch.device) -> dict[str, Tensor]:
    """Outputs {task: float32 (channels, height, width)} for one image uint8 (H, W, 3), at the network's size."""
    small = resize_rgb(rgb, info.height, info.width)
    image = torch.from_numpy(small.copy()).permute(2, 0, 1)[None].to(device)
    with torch.inference_mode():
        return {name: output[0].cpu() for name, output in step.predict(image).items()}


def write(out: Path, stem: str, rgb: np.ndarray, outputs: dict[str, Tensor], step: MultiTaskStep) -> None:
    """Write the files of one image into ``out``."""
    size = (rgb.shape[1], rgb.shape[0])
    tiles = {"image": rgb}
    for task in step.tasks:
        task.write(out / stem, task.result(outputs[task.name], size))
        for caption, tile in task.tiles(None, {task.part: outputs[task.name]}).items():
            tiles[caption] = np.asarray(Image.fromarray(tile).resize(size, Image.Resampling.NEAREST))
    Image.fromarray(pictures.row(tiles)).save(out / f"{stem}.preview.png")


def is_override(word: str) -> bool:
    """Whether a word of the command line is a ``key=value`` and not an image."""
    return re.match(r"[a-z_]+(\.[a-z_]+)*=", word) is not None and not Path(word).exists()


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The images among ``paths``, and those in folders among them. InputError if a path is neither, or if stems
    collide."""
    images: dict[str, Path] = {}
    for path in paths:
        found = [p for p in entries(path) if p.suffix.lower() in SUFFIXES] if path.is_dir() else [path]
        for image in found:
            if not image.is_file():
                raise InputError(f"{image} does not exist")
            if image.stem in images:
                raise InputError(f"{image} and {images[image.stem]} have the same stem; predict them apart")
            images[image.stem] = image
    if not paths:
        raise InputError("the following arguments are required: IMAGE; mtunet predict --help says more")
    if not images:
        raise InputError(f"no image ({', '.join(SUFFIXES)}) in {', '.join(map(str, paths))}")
    return list(images.values())


def check_out(out: Path, images: Sequence[Path]) -> None:
    """Raise InputError if later runs would read the results in ``out`` as images."""
    for image in images:
        if out.resolve() in (image.parent.resolve(), image.resolve().parent):
            raise InputError(f"--out {out}: {image} lies there, and results would be taken for images; choose another")
    check_outside(out, "--out")


@command
def main() -> None:
    """The command line."""
    parser = arguments.parser("predict", __doc__.splitlines()[0])
    arguments.add_run(parser)
    parser.add_argument(
        "words", nargs="+", metavar="IMAGE", help="image files, or folders of them; key=value changes the run's config"
    )
    parser.add_argument("--out", type=arguments.folder, required=True, metavar="FOLDER", help="where the results go")
    arguments.add_device(parser)
    args = parser.parse_intermixed_args()
    args.overrides = [word for word in args.words if is_override(word)]
    images = find_images([arguments.path(word) for word in args.words if not is_override(word)])
    check_out(args.out, images)
    state, config, file = load_run(args.path, ["device=auto", *arguments.overrides(args)])  # not the training's device
    device = distributed.pick_device(config.device)
    info = DatasetInfo.from_json(json.loads(state["dataset"]))
    step = load_step(state, config, device)
    args.out.mkdir(parents=True, exist_ok=True)
    for path in track(images, description=escape(str(file))):
        rgb = decode(read_bytes(path), RGB, str(path))
        write(args.out, path.stem, rgb, predict(step, info, rgb, device), step)
    print(f"{len(images)} images written to {args.out}")
    for task in step.tasks:
        print(task.about_files())


if __name__ == "__main__":
    main()
