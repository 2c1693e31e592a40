"""How many cores a process may use, and how OpenMP's threads wait for work."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mtunet_dist.system import startup
from mtunet_dist.system.machine import cpus

REPOSITORY = Path(__file__).parents[2]
COUNTERS = {"cpu_count", "process_cpu_count", "sched_getaffinity", "get_num_threads", "cpu_affinity"}


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n", encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),  # no control groups at all
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, 8),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "250000 100000"}, 3),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "9900000 100000"}, 8),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "nonsense"}, 8),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "200000 100000"}, 2),  # the parent is stricter
        (
            {"proc/self/cgroup": "0::/host/path", "sys/fs/cgroup/cpu.max": "200000 100000"},
            2,
        ),  # not there in a container
        (
            {
                "proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/job\n1:name=systemd:/x",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "150000",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "3:cpuacct,cpu:/docker/id",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            1,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            8,
        ),
    ],
)
def test_a_share_of_the_cores_time_counts_as_so_many_cores(
    files: dict[str, str], expected: int, tmp_path: Path
) -> None:
    assert cpus(write(tmp_path, files)) == expected


def test_binding_and_slurm_count_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "4")
    assert cpus(tmp_path) == 4
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3, 5})
    assert cpus(tmp_path) == 2


def test_cores_are_counted_in_one_place() -> None:
    """By their name or as a method: whatever else counts cores sees neither a container's share nor a job's."""
    wrong = []
    for folder in ("mtunet_dist", "launch", "slurm", "tune"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                name = getattr(node, "attr", None) or getattr(node, "id", None)
                if name in COUNTERS and path.name != "machine.py":
                    wrong.append(f"{path.relative_to(REPOSITORY)}: {name}")
    assert not wrong


@pytest.mark.parametrize("share", [2, 8])
def test_threads_wait_passively_and_are_as_many_as_the_share(share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "cpus", lambda: share)
    environment: dict[str, str] = {}
    startup.set_threads(environment)
    assert environment.pop("OMP_WAIT_POLICY") == "PASSIVE"
    assert environment == ({"OMP_NUM_THREADS": "2"} if share == 2 else {})
    for own in startup.WAITING:
        environment = {own: "1", "OMP_NUM_THREADS": "5"}
        startup.set_threads(environment)
        assert environment == {own: "1", "OMP_NUM_THREADS": "5"}


def test_the_library_leaves_the_program_that_imports_it_alone() -> None:
    code = """if True:
        import os, signal, sys
        def state():
            return dict(os.environ), signal.getsignal(signal.SIGINT), list(sys.warnoptions), sys.stdout
        before = state()
        import mtunet_dist.train, mtunet_dist.cli, mtunet_dist.prepare
        after = state()
        changed = {k for k in after[0] if before[0].get(k) != after[0][k]}
        sys.exit(str(changed) if changed & {"OMP_WAIT_POLICY", "OMP_NUM_THREADS"} or before[1:] != after[1:] else 0)
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)
