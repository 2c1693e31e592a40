"""Whatever dies, a run ends with the bits of an undisturbed one: kills, signals, full disks, damaged files, a hang.

Two ranks under plain torchrun, or where that has been seen to do its part, under the quicker one of ``preloaded``.
``pytest tests/faults -s`` prints the table.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from helpers import preloaded
from helpers.training import assert_same_state, final_state, kill_all, records
from mtunet_dist.runs import checkpoint
from mtunet_dist.system.command import HUNG

pytestmark = pytest.mark.slow

WORKER = Path(__file__).parent / "worker.py"
PATIENCE_S = 600  # on a busy machine; a hang is what takes longer
KILLS = {  # how often at which place
    "in a step": 6,
    "in all-reduce": 5,
    "saving: half written": 2,
    "saving: written, not named": 2,
    "saving: best named, newest not": 1,
    "in evaluation": 4,
}
ON_MAIN = ("saving",)  # places that only rank 0 comes to
SIGNALS = 10
EPOCHS = 32  # of 3 steps
Process = subprocess.Popen[bytes] | preloaded.Torchrun


class Training:
    """A run of its own folder, started as often as need be with the same command."""

    def __init__(self, folder: Path, settings: list[str]) -> None:
        self.run_dir, self.plan = folder / "run", folder / "plan"
        self.plan.mkdir(parents=True, exist_ok=True)
        self.config = folder / "config.yaml"
        self.config.write_text("{}\n")
        self.settings = settings
        self.output = folder / "output.txt"

    def fault(self, number: int, place: str, count: int, rank: int) -> None:
        """Plan a fault, see worker.py."""
        text = json.dumps({"place": place, "count": count, "rank": rank})
        (self.plan / f"{number:02d}.json").write_text(text)

    @contextmanager
    def started(self, *words: str, restarts: int = 0, real: bool = False) -> Iterator[Process]:
        """torchrun at work, torch's own if ``real``; every process of it is gone afterwards."""
        command = [str(WORKER), str(self.plan), str(self.config), *self.settings, f"run_dir={self.run_dir}", *words]
        process = (self._torchrun if real else self._preloaded)(command, restarts)
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            kill_all(self.run_dir)

    def _preloaded(self, command: list[str], restarts: int) -> Process:
        return preloaded.Torchrun(command, self.output, ranks=2, restarts=restarts)

    def _torchrun(self, command: list[str], restarts: int) -> Process:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        torchrun += [f"--max-restarts={restarts}", *command]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self.output.open("ab") as output:
            return subprocess.Popen(torchrun, env=environment, stdout=output, stderr=subprocess.STDOUT)

    def finish(self, *words: str, restarts: int = 0, real: bool = False) -> int:
        """Run until it ends; its exit code."""
        with self.started(*words, restarts=restarts, real=real) as process:
            return process.wait(PATIENCE_S)

    def wait_for(self, condition: Callable[[], bool], process: Process) -> None:
        """Until ``condition`` holds or the process has ended."""
        deadline = time.monotonic() + PATIENCE_S
        while process.poll() is None and not condition():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    @property
    def reports(self) -> int:
        """Steps reported so far."""
        with suppress(FileNotFoundError, json.JSONDecodeError):
            return len(records(self.run_dir, "train"))
        return 0

    @property
    def newest(self) -> Path:
        """The newest checkpoint."""
        return checkpoint.by_age(self.run_dir / "checkpoints")[0]

    @property
    def starts(self) -> int:
        """How often its processes were started, as far as building the training."""
        return self.said().count("; run folder ")

    def said(self) -> str:
        """Everything the processes printed."""
        return self.output.read_text(errors="replace")


@pytest.fixture(scope="module")
def settings(prepared: Path) -> list[str]:
    return [
        f"data.root={prepared}",
        "model.widths=[4,4,8,8]",
        "model.bottleneck=8",
        "batch_size=4",
        "eval_batch_size=1",
        f"epochs={EPOCHS}",
        "device=cpu",
        "log.pictures=0",
        "log.every_steps=1",
        "optim.lr=0.003",
        "checkpoint.every_steps=2",
        "checkpoint.keep=3",
        "data.augment.flip=true",
        f"timeout_s={PATIENCE_S / 2}",  # so a hang shows its stacks, and its restart is one too many
    ]


@pytest.fixture(scope="module")
def undisturbed(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> checkpoint.State:
    training = Training(tmp_path_factory.mktemp("undisturbed"), settings)
    assert training.finish() == 0, training.said()
    return final_state(training.run_dir)


@pytest.fixture
def training(settings: list[str], tmp_path: Path) -> Training:
    return Training(tmp_path, settings)


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    """Lines that the tests add to, printed at the end."""
    lines = ["fault".ljust(48) + "times  final weights"]
    yield lines
    print("\n" + "\n".join(lines))


@pytest.fixture
def same_bits(training: Training, undisturbed: checkpoint.State, table: list[str]) -> Callable[[str, int], None]:
    """Check that the run ended as the undisturbed one, and say so in the table."""

    def check(fault: str, times: int) -> None:
        assert_same_state(final_state(training.run_dir), undisturbed)
        steps = [int(r["step"]) for r in records(training.run_dir, "train")]
        assert steps == list(range(1, 3 * EPOCHS + 1))
        table.append(f"{fault.ljust(48)}{times:5d}  bitwise equal")

    return check


def test_killed_at_twenty_moments(training: Training, same_bits: Callable[[str, int], None]) -> None:
    """The agent starts both ranks again after each: torchrun after two of them, until it gives up."""
    chance = random.Random(5178)
    places = [place for place, times in KILLS.items() for _ in range(times)]
    chance.shuffle(places)
    for number, place in enumerate(places):
        rank = 0 if place.startswith(ON_MAIN) else chance.randrange(2)
        count = {"saving": chance.randint(1, 2), "in eval": chance.randint(1, 4)}.get(place[:7], chance.randint(1, 9))
        training.fault(number, place, 1 if "best" in place else count, rank)
    assert training.finish(restarts=2, real=True) == 1, training.said()
    assert len(list(training.plan.glob("*.happened"))) == 3
    assert training.finish(restarts=len(places) - 3) == 0, training.said()
    assert len(list(training.plan.glob("*.happened"))) == len(places) == 20
    assert training.starts == 1 + len(places)
    for place, times in KILLS.items():
        same_bits(f"SIGKILL {place}", times)


def test_asked_to_stop_at_ten_moments(training: Training, same_bits: Callable[[str, int], None]) -> None:
    """SIGTERM to the agent, as schedulers send it, after another number of reports each time; twice to torchrun."""
    chance = random.Random(24)
    for number in range(SIGNALS):
        with training.started(real=number < 2) as process:
            wanted = training.reports + chance.randint(1, 4)
            training.wait_for(lambda wanted=wanted: training.reports >= wanted, process)
            assert process.poll() is None, training.said()
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE_S)
        assert checkpoint.path_of(training.newest.parent, training.reports) == training.newest  # no step is lost
    assert training.said().count("SIGTERM received: stopped after step") >= SIGNALS
    assert training.finish() == 0, training.said()
    assert training.starts == 1 + SIGNALS
    same_bits("SIGTERM to torchrun", SIGNALS)


def test_a_rank_that_is_stopped_is_noticed_and_all_start_again(
    training: Training, same_bits: Callable[[str, int], None]
) -> None:
    training.fault(0, "stopped", 6, 1)
    assert training.finish("timeout_s=15", restarts=1, real=True) == 0, training.said()
    dump = (training.run_dir / "hang" / "rank_0.before.txt").read_text()  # as it was started again
    assert "_optimiser_step" in dump or "all_reduce" in dump
    assert len(list((training.run_dir / "hang").iterdir())) == 1
    assert "rank 0 has not moved for 15 s (timeout_s)" in training.said()
    assert f"exitcode  : {HUNG}" in training.said() or f"exitcode: {HUNG}" in training.said()
    assert training.starts == 2
    same_bits("SIGSTOP of a rank", 1)


def test_a_damaged_newest_checkpoint_and_a_removed_one(
    training: Training, same_bits: Callable[[str, int], None]
) -> None:
    for damage in (_flip_a_bit, Path.unlink):
        with training.started() as process:
            wanted = training.reports + 7
            training.wait_for(lambda wanted=wanted: training.reports >= wanted, process)
            process.kill()
        damage(training.newest)
    assert training.finish() == 0, training.said()
    assert "is damaged: wrong checksum of" in training.said()
    same_bits("bit flipped in the newest checkpoint", 1)
    same_bits("newest checkpoint removed", 1)


def _flip_a_bit(path: Path) -> None:
    """In the middle, among weights, where reading would notice nothing."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def small_disk(training: Training) -> Iterator[Callable[[int], None]]:
    """The run folder as a disk of its own; call it with the free kilobytes to keep on it, -1 for all there are."""
    training.run_dir.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", training.run_dir], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small disk can only be mounted as root")
    filler, keep = training.run_dir / "filler", -1

    def fill() -> None:
        """Until told otherwise: each checkpoint that goes because a newer one is there leaves room for a third."""
        with filler.open("ab", buffering=0) as file:
            while keep >= 0:
                disk = os.statvfs(training.run_dir)
                with suppress(OSError):
                    file.write(bytes(max(0, disk.f_bavail * disk.f_bsize - 1024 * keep)))
                time.sleep(0.01)

    def leave(kilobytes: int) -> None:
        nonlocal keep
        keep = kilobytes
        if kilobytes >= 0:
            filling.submit(fill)
        else:
            filling.shutdown()
            filler.unlink()

    with ThreadPoolExecutor(1) as filling:
        yield leave
        keep = -1
    subprocess.run(["umount", "--lazy", training.run_dir], check=True)


def test_a_full_disk_stops_the_training_and_leaves_the_older_checkpoint(
    training: Training, small_disk: Callable[[int], None], same_bits: Callable[[str, int], None]
) -> None:
    with training.started() as process:
        training.wait_for(lambda: training.reports >= 5, process)
        small_disk(100)
        process.wait(PATIENCE_S)
    assert process.returncode == 1
    errors = [line for line in training.said().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, training.said()
    assert errors[0].endswith("No space left on device")
    checkpoint.check(training.newest)
    assert not list(training.newest.parent.glob("*.tmp"))
    small_disk(-1)
    assert training.finish() == 0, training.said()
    same_bits("disk full, on_write_error=stop", 1)


def test_training_goes_on_with_a_full_disk_if_asked(
    training: Training,
    undisturbed: checkpoint.State,
    small_disk: Callable[[int], None],
    table: list[str],
) -> None:
    """Space comes back in time; then, in a second run, it does not."""
    with training.started("on_write_error=continue") as process:
        training.wait_for(lambda: training.reports >= 5, process)
        small_disk(0)
        training.wait_for(lambda: training.said().count("training goes on, as on_write_error=continue") > 4, process)
        checkpoint.check(training.newest)
        small_disk(-1)
        assert process.wait(PATIENCE_S) == 0, training.said()
    assert_same_state(final_state(training.run_dir), undisturbed)
    assert training.starts == 1
    table.append(f"{'disk full for a while, on_write_error=continue'.ljust(48)}{1:5d}  bitwise equal")


def test_the_end_must_be_saved_even_then(
    training: Training, small_disk: Callable[[int], None], same_bits: Callable[[str, int], None]
) -> None:
    with training.started("on_write_error=continue") as process:
        training.wait_for(lambda: training.reports >= 5, process)
        small_disk(0)
        assert process.wait(PATIENCE_S) == 1
    assert "error: cannot save checkpoint" in training.said()
    checkpoint.check(training.newest)
    small_disk(-1)
    assert training.finish() == 0, training.said()
    same_bits("disk full to the end, on_write_error=continue", 1)


def test_a_folder_that_becomes_read_only_stops_the_training(
    training: Training, small_disk: Callable[[int], None], same_bits: Callable[[str, int], None]
) -> None:
    with training.started() as process:
        training.wait_for(lambda: training.reports >= 5, process)
        folder = training.newest.parent
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        assert process.wait(PATIENCE_S) == 1
    errors = [line for line in training.said().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, training.said()
    assert errors[0].endswith("Read-only file system")
    checkpoint.check(training.newest)
    subprocess.run(["umount", "--lazy", folder], check=True)
    assert training.finish() == 0, training.said()
    same_bits("checkpoints become read-only", 1)
