"""Files and folders that this user may not read: one line that names them, whichever command comes upon them."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mtunet_dist.config import Config, load_config, save_config
from mtunet_dist.system.command import command

# root reads everything while it has its capabilities, so the command gives them up.
RUN = """
import ctypes, runpy, sys
ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
sys.argv = sys.argv[1:]
runpy.run_module(f"mtunet_dist.{sys.argv[0]}", run_name="__main__")
"""


@pytest.fixture
def source(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared.parent / "source", tmp_path / "source"))


@pytest.fixture
def data(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "data"))


def error_of(*words: object) -> str:
    result = subprocess.run([sys.executable, "-c", RUN, *map(str, words)], capture_output=True, text=True, timeout=120)
    lines = [line for line in result.stderr.splitlines() if "Warning" not in line]
    assert result.returncode == 2 and len(lines) == 1, result.stderr
    assert lines[0].startswith("error: "), lines
    return lines[0]


@pytest.mark.parametrize("name", ["train-00001.tar", "dataset.json", "."])
@pytest.mark.parametrize("command", ["prepare --verify", "summary"])
def test_a_part_of_a_prepared_dataset(data: Path, tmp_path: Path, name: str, command: str) -> None:
    (data / name).chmod(0)
    error = error_of(*command.split(), data, *(["--out", tmp_path / "x.png"] if command == "summary" else []))
    (data / name).chmod(0o700)
    assert str(data / name) in error and "Permission denied" in error


@pytest.mark.parametrize("words", [["data.loader=dali"], ["data.loader=torch"], ["data.cache=host"]])
def test_a_shard_that_is_trained_on(data: Path, overrides: list[str], tmp_path: Path, words: list[str]) -> None:
    config: Config = load_config(None, [*overrides, f"data.root={data}", "log.pictures=0", "epochs=1"])
    save_config(config, tmp_path / "config.yaml")
    if words == ["data.loader=torch"]:
        # The process of a worker has its capabilities back, as root; the pictures are read in this one.
        words = [*words, "log.pictures=1", "data.eval=train"]
    for shard in data.glob("train-*.tar"):
        shard.chmod(0)
    error = error_of("train", tmp_path / "config.yaml", *words)
    assert "Permission denied" in error and "train-0000" in error and "sample 0" in error


@pytest.mark.parametrize(
    "name", ["dataset.yaml", "train/rgb/003.png", "val/label/001.png", "train", "train/depth", "."]
)
def test_a_part_of_a_source(source: Path, tmp_path: Path, name: str) -> None:
    (source / name).chmod(0)
    error = error_of("prepare", "folder", source, tmp_path / "out", "--workers", "0")
    (source / name).chmod(0o700)
    assert str(source / name) in error and "Permission denied" in error


def test_a_folder_to_write_to(source: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(0o500)
    for out in (tmp_path / "closed", tmp_path / "closed" / "out"):
        error = error_of("prepare", "folder", source, out, "--workers", "0")
        assert "closed" in error and "Permission denied" in error


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_what_may_not_be_written_is_one_line_and_other_failures_keep_their_traceback(
    capsys: pytest.CaptureFixture[str], number: int
) -> None:
    @command
    def main() -> None:
        raise OSError(raised, os.strerror(raised), "disk/summary.png")

    raised = number
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: disk/summary.png: {os.strerror(number)}\n"
    raised = errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        main()
