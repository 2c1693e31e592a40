"""A Slurm of the tests' own: munged, slurmctld and a few slurmd on this machine, as root, below one folder.

All nodes are this machine under other names, which do not resolve; each claims more CPUs than there are. Ports, keys
and sockets are the cluster's own, so that it disturbs neither another one nor an installed Slurm.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client")
REQUIRED = os.environ.get("MTUNET_TEST_SLURM") == "require"  # install what is missing, and fail instead of skipping
NODES, CPUS = ("n1", "n2", "n3"), 4

CONF = """\
ClusterName=mtunet
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
# cred_expire is also how long a requeued job waits; less than 5 would mean 120
AuthInfo=socket={root}/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=60
KillWait=10
MinJobAge=3600
MailProg=/bin/true
"""
PARTITIONS = """\
PartitionName=low Nodes=ALL Default=YES DefaultTime=00:20:00 PriorityTier=1 GraceTime=60 State=UP
PartitionName=high Nodes=ALL DefaultTime=00:20:00 PriorityTier=2 PreemptMode=OFF State=UP
"""


class SlurmCluster:
    """A running cluster. ``environment`` makes Slurm's commands, and what they start, talk to it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(root / "slurm.conf"),
            "OMP_NUM_THREADS": "1",
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        }

    def call(self, *words: str, cwd: Path | None = None, **variables: str) -> str:
        """Run a command in the cluster's environment; what it prints. Fails the test if the command fails."""
        environment = {**self.environment, **variables}
        done = subprocess.run(words, env=environment, cwd=cwd, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job(self, job_id: str) -> dict[str, str]:
        """What Slurm knows of a job, by the names that ``scontrol show job`` prints; text with spaces is cut short."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.call("scontrol", "show", "job", "-o", job_id)))

    def wait(self, job_id: str, *states: str, timeout: float = 240) -> dict[str, str]:
        """The job once it is in one of ``states``."""
        last: dict[str, str] = {}

        def reached() -> bool:
            last.update(self.job(job_id))
            return last["JobState"] in states

        wait_for(reached, lambda: f"job {job_id} is not {states}: {last}\n{self.log(last)}", timeout)
        return last

    def log(self, job: dict[str, str]) -> str:
        """The end of a job's log."""
        path = Path(job.get("StdOut", "/"))
        return path.read_text(encoding="utf-8", errors="replace")[-4000:] if path.is_file() else "no log"

    def start_node(self, name: str) -> None:
        """Start a node's daemon."""
        self.call("slurmd", "-N", name)

    def kill_node(self, name: str) -> None:
        """What a power failure does: nothing that runs on the node is left."""
        daemon = _pid(self.root / f"slurmd-{name}.pid")
        log = str(self.root / f"slurmd-{name}.log")
        steps = [pid for pid in self.processes() if _name(pid) == "slurmstepd" and log in _open_files(pid)]
        for pid in [*filter(None, [daemon]), *steps, *(child for step in steps for child in _descendants(step))]:
            _kill(pid)

    def kill(self, program: str, argument: str) -> None:
        """Kill the processes of a name that have ``argument`` in their command; waits for the first."""
        found: list[int] = []

        def find() -> bool:
            found[:] = [p for p in self.processes() if _name(p) == program and argument.encode() in _read(p, "cmdline")]
            return bool(found)

        wait_for(find, lambda: f"no {program} {argument}", 120)
        for pid in found:
            _kill(pid)

    def processes(self) -> list[int]:
        """Everything that this cluster has started and that still runs: it has the name of our slurm.conf."""
        mark = f"SLURM_CONF={self.environment['SLURM_CONF']}".encode()
        return [pid for pid in _all_pids() if mark in _read(pid, "environ").split(b"\0")]

    def close(self) -> None:
        """End all of it."""
        for name in ("slurmctld", *(f"slurmd-{node}" for node in NODES)):
            if pid := _pid(self.root / f"{name}.pid"):
                _kill(pid)
        while left := self.processes():
            for pid in left:
                _kill(pid)
            time.sleep(0.1)


def wait_for(done: Callable[[], bool], explain: Callable[[], str], timeout: float) -> None:
    """Return as soon as ``done()``; fail with ``explain()`` after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not done():
        if time.monotonic() > deadline:
            pytest.fail(explain())
        time.sleep(0.2)


def missing() -> str:
    """Why there can be no cluster here, or nothing."""
    if os.geteuid() != 0:
        return "only root can start a Slurm of its own"
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = [name for name in PROGRAMS if not shutil.which(name, path=path)]
    if absent and REQUIRED:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update", "-q"], check=True, timeout=300)
        install = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *PACKAGES]
        subprocess.run(install, check=True, env=environment, timeout=600)
        absent = []
    return f"no {', '.join(absent)}: apt-get install {' '.join(PACKAGES)}" if absent else ""


@contextmanager
def started() -> Iterator[SlurmCluster]:
    """A cluster of ``NODES`` with ``CPUS`` each. Skips the test where there can be none, unless it is ``REQUIRED``."""
    if reason := missing():
        (pytest.fail if REQUIRED else pytest.skip)(reason)
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm_", ignore_cleanup_errors=True)))
        root.chmod(0o755)
        cluster = SlurmCluster(root)
        key = root / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        munge = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={root}/munge.socket"]
        munge += [f"--pid-file={root}/munged.pid", f"--log-file={root}/munged.log", f"--seed-file={root}/munge.seed"]
        with (root / "munged.err").open("wb") as errors:
            munged = subprocess.Popen(munge, env=cluster.environment, stderr=errors)
        stack.callback(munged.wait)
        stack.callback(munged.terminate)
        stack.callback(cluster.close)
        write_configuration(root)
        wait_for((root / "munge.socket").exists, (root / "munged.err").read_text, 30)
        cluster.call("slurmctld", "-i")
        for name in NODES:
            cluster.start_node(name)
        wait_for(lambda: idle(cluster) == len(NODES), lambda: cluster.call("sinfo", "-R", "-N", "-l"), 60)
        yield cluster


def idle(cluster: SlurmCluster) -> int:
    """Nodes that wait for work."""
    return len(cluster.call("sinfo", "-h", "-N", "-p", "low", "-t", "idle", "-o", "%N").split())


def write_configuration(root: Path) -> None:
    """slurm.conf with free ports."""
    with ExitStack() as stack:
        ports = []
        for _ in range(1 + len(NODES)):
            free = stack.enter_context(socket.socket())
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    host = socket.gethostname().split(".")[0]
    nodes = "".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} RealMemory=4000\n"
        for name, port in zip(NODES, ports[1:], strict=True)
    )
    (root / "state").mkdir()
    for name in NODES:
        (root / f"spool-{name}").mkdir()
    text = CONF.format(root=root, host=host, port=ports[0]) + nodes + PARTITIONS
    (root / "slurm.conf").write_text(text, encoding="utf-8")


def _pid(file: Path) -> int | None:
    return int(file.read_text()) if file.is_file() and file.read_text().strip() else None


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _all_pids() -> list[int]:
    """Without those that have ended and wait to be reaped."""
    pids = [int(p.name) for p in Path("/proc").glob("[0-9]*") if int(p.name) != os.getpid()]
    return [pid for pid in pids if _read(pid, "cmdline")]


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def _name(pid: int) -> str:
    return _read(pid, "comm").decode(errors="replace").strip()


def _open_files(pid: int) -> list[str]:
    found = []
    for link in Path(f"/proc/{pid}/fd").glob("*"):
        with suppress(OSError):
            found.append(str(link.readlink()))
    return found


def _descendants(pid: int) -> list[int]:
    children = [int(word) for task in Path(f"/proc/{pid}/task").glob("*") for word in _children(task)]
    return children + [inner for child in children for inner in _descendants(child)]


def _children(task: Path) -> list[str]:
    try:
        return (task / "children").read_text().split()
    except OSError:
        return []
