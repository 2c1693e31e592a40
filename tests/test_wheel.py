"""The wheel: all that a user needs away from the repository is inside."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the content of the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build leaves files in the folder that it builds from
    shutil.copytree(REPOSITORY / "mtunet_dist", source / "mtunet_dist", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", f"-w{folder}"]
    subprocess.run([*command, str(source)], check=True, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "site")
    return folder / "site"


def mtunet(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """``mtunet words...`` in ``folder`` with the package from the wheel."""
    assert not folder.is_relative_to(REPOSITORY)
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from mtunet_dist.cli import main; main()", *words]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)


def test_every_file_of_the_package_is_inside(installed: Path) -> None:
    package = REPOSITORY / "mtunet_dist"
    wanted = {str(p.relative_to(package)) for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    found = {
        str(p.relative_to(installed / "mtunet_dist")) for p in (installed / "mtunet_dist").rglob("*") if p.is_file()
    }
    assert found == wanted
    assert {"slurm/train.sbatch", "slurm/sweep.sbatch", "slurm/common.sh", "slurm/local.sh", "py.typed"} <= found
    assert not (installed / "tests").exists() and not (installed / "launch").exists()


def test_who_only_trains_needs_neither_ray_nor_deepspeed(installed: Path) -> None:
    (metadata,) = installed.glob("*.dist-info/METADATA")
    needed = [line for line in metadata.read_text(encoding="utf-8").splitlines() if line.startswith("Requires-Dist:")]
    always = [line for line in needed if "extra ==" not in line]
    assert not [line for line in always if "ray" in line or "optuna" in line or "deepspeed" in line]
    assert [line for line in needed if "deepspeed" in line and 'extra == "deepspeed"' in line]
    assert [line for line in needed if "ray[tune]" in line and 'extra == "tune"' in line]


@pytest.mark.slow
def test_the_verbs_work_away_from_the_repository(installed: Path, prepared: Path, tmp_path: Path) -> None:
    where = "import mtunet_dist; print(mtunet_dist.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    said = subprocess.run([sys.executable, "-c", where], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert Path(said.stdout.strip()).is_relative_to(installed)

    (tmp_path / "tiny.yaml").write_text(
        f"{{run_dir: run, data: {{root: {prepared}}}, model: {{name: mtunet, widths: [4, 4, 8, 8], bottleneck: 8}}, "
        "epochs: 1, batch_size: 4, device: cpu}\n"
    )
    launched = mtunet(installed, tmp_path, "launch", "--nproc=2", "tiny.yaml")
    assert launched.returncode == 0, launched.stderr
    assert (tmp_path / "run" / "checkpoints" / "best.pt").is_file()
    assert "run" in mtunet(installed, tmp_path, "status", ".").stdout
    submitted = mtunet(installed, tmp_path, "submit", "train", "tiny.yaml", "run_dir=other", "--nodes=2", "--dry-run")
    assert submitted.returncode == 0, submitted.stderr
    assert f"MTUNET_HOME={installed}" in submitted.stdout and "mtunet_dist/slurm/common.sh" in submitted.stdout

    (tmp_path / "sweep.yaml").write_text(
        "{name: s, run_dir: swept, config: tiny.yaml, trials: 1, space: {optim.lr: {uniform: [1.0e-4, 1.0e-3]}}}\n"
    )
    swept = mtunet(installed, tmp_path, "sweep", "sweep.yaml")
    assert swept.returncode == 0, swept.stdout + swept.stderr
    assert (tmp_path / "swept" / "report.md").is_file()


@pytest.mark.parametrize(
    ("words", "missing", "extra"),
    [(["sweep", "s.yaml"], "ray", "tune"), (["train", "c.yaml", "strategy.name=deepspeed"], "deepspeed", "deepspeed")],
)
def test_a_missing_extra_is_one_line(
    installed: Path, prepared: Path, tmp_path: Path, words: list[str], missing: str, extra: str
) -> None:
    (tmp_path / "c.yaml").write_text(f"{{run_dir: run, data: {{root: {prepared}}}}}\n")
    (tmp_path / "s.yaml").write_text("{name: s, run_dir: s, config: c.yaml, trials: 1, space: {seed: {choice: [1]}}}\n")
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] == {missing!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{installed}"}
    command = [sys.executable, "-c", "from mtunet_dist.cli import main; main()", *words]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert f"needs the package {missing}: pip install 'mtunet_dist[{extra}]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
