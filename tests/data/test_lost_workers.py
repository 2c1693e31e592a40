"""Worker processes that are killed, or have no room in shared memory: one line soon, or no harm; never a hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.training import children, wait_until
from mtunet_dist.errors import LostProcessError
from mtunet_dist.system.command import command

# A limit on the size of files is one on that of shared memory too, and inherited.
NO_ROOM = """
import resource, sys, torch
from pathlib import Path
from mtunet_dist.data.order import TrainOrder
from mtunet_dist.data.prepared import PreparedDataset
from mtunet_dist.data.torch_loader import TorchLoader

if __name__ == "__main__":
    split = PreparedDataset(Path(sys.argv[1])).split("train")
    here, there = (TorchLoader(split, TrainOrder(12, batch_size=6), torch.device("cpu"), workers=n) for n in (0, 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    for _, a, b in zip(range(5), here.batches(), there.batches()):
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    print("as in one process")
"""
WORDS = {
    "train": ["train", "config.yaml", "data.loader=torch", "data.threads=2", "epochs=2000", "eval_every_epochs=0"],
    "prepare": ["prepare", "folder", "source", "out", "--workers", "2", "--shard-size", "1"],
    "synthesize": ["synthesize", "streets", "--workers", "2", "--train", "500"],
}
SAYS = {
    "train": "use fewer data.threads",
    "prepare": "use fewer workers or smaller shards",
    "synthesize": "use fewer workers",
}


def test_workers_without_shared_memory_send_the_same_batches(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(NO_ROOM)
    words = [sys.executable, str(tmp_path / "script.py"), str(prepared)]
    result = subprocess.run(words, capture_output=True, text=True, timeout=100, check=False)
    assert result.stdout == "as in one process\n", result.stderr


def workers(pid: int) -> list[int]:
    """The worker processes of ``pid``; not what watches over its semaphores."""
    found = []
    for child in children(pid):
        try:
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(child)
        except OSError:
            continue
    return found


@pytest.mark.parametrize("name", WORDS)
def test_a_killed_worker_ends_the_command_with_one_line(
    prepared: Path, tmp_path: Path, overrides: list[str], name: str
) -> None:
    (tmp_path / "source").symlink_to(prepared.parent / "source")
    (tmp_path / "config.yaml").write_text("{}\n")
    words = [*WORDS[name], *(overrides if name == "train" else [])]
    words = [word for word in words if word != "epochs=2"]
    run = [sys.executable, "-c", "import sys; from mtunet_dist import cli; cli.main()", *words]
    process = subprocess.Popen(run, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: len(workers(process.pid)) == 2, process, patience_s=100)
        os.kill(workers(process.pid)[0], signal.SIGKILL)
        error = process.communicate(timeout=60)[1]
    finally:
        process.kill()
        process.wait()
    lines = [line for line in error.splitlines() if "Warning" not in line and "warnings.warn" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: a worker process"), error
    assert SAYS[name] in lines[0] and "the same command goes on" in lines[0]
    assert process.returncode == 1  # a crash, after which launchers may start again


def test_a_lost_process_is_not_the_users_error(capsys: pytest.CaptureFixture[str]) -> None:
    @command
    def main() -> None:
        raise LostProcessError("gone")

    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1 and capsys.readouterr().err == "error: gone\n"
