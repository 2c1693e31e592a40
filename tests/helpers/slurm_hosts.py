"""A Slurm of the tests' own whose nodes are hosts: they share neither names, loopback, /tmp nor /dev/shm.

See slurm_hosts.sh. slurm_cluster.py has nodes that are all this machine, for what is not about that.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from helpers.slurm_cluster import REQUIRED, SlurmCluster, missing

SCRIPT = Path(__file__).with_suffix(".sh")
REPOSITORY = Path(__file__).parents[2]
PROGRAMS = ("ip", "unshare", "nsenter")


class SlurmHosts(SlurmCluster):
    """A running cluster; ``call`` runs a command on the host from which users submit."""

    def __init__(self, root: Path, settings: dict[str, str]) -> None:
        super().__init__(root)
        self.environment |= {"CLUSTER_ROOT": str(root), **settings}

    def call(self, *words: str, cwd: Path | None = None, **variables: str) -> str:
        """Run a command on the host ``login``; what it prints. Fails the test if the command fails."""
        return super().call("bash", str(SCRIPT), "on", "login", *words, cwd=cwd, **variables)

    def start(self, host: str, *words: str, cwd: Path) -> subprocess.Popen[str]:
        """Run a command on a host; it is not waited for."""
        command = ["bash", str(SCRIPT), "on", host, *words]
        return subprocess.Popen(command, env=self.environment, cwd=cwd, stderr=subprocess.PIPE, text=True)

    def do(self, *words: str) -> None:
        """``cut n1``, ``heal n1``, ``kill n1``, ``boot n1``."""
        done = subprocess.run(["bash", str(SCRIPT), *words], env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}: {done.stderr}"


def no_hosts() -> str:
    """Why there can be no hosts here, or nothing."""
    if reason := missing():
        return reason
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if absent := [name for name in PROGRAMS if not shutil.which(name, path=path)]:
        return f"no {', '.join(absent)}: apt-get install iproute2 util-linux"
    made = subprocess.run(["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True)
    return f"no namespaces, which need CAP_SYS_ADMIN: {made.stderr.decode().strip()}" if made.returncode else ""


@contextmanager
def started(nodes: int, names: str, *shared: Path) -> Iterator[SlurmHosts]:
    """A cluster of ``nodes`` hosts that know one another as ``names`` says: debian, clean or none.

    The repository, Python and ``shared`` are what they share. Skips the test where there can be none, unless it is
    ``REQUIRED``.
    """
    if reason := no_hosts():
        (pytest.fail if REQUIRED else pytest.skip)(reason)
    with tempfile.TemporaryDirectory(prefix="mt", ignore_cleanup_errors=True) as folder:
        root = Path(folder)
        root.chmod(0o755)
        folders = dict.fromkeys(map(str, [REPOSITORY, sys.base_prefix, sys.prefix, *shared]))
        settings = {"NODES": str(nodes), "CPUS": "4", "HOSTS": names, "SHARE": " ".join(folders)}
        cluster = SlurmHosts(root, settings)
        try:
            cluster.do("start")
            yield cluster
        finally:
            cluster.do("stop")
