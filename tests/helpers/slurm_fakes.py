"""Fakes for Slurm's commands and for Python, to run a batch script with.

They only record how they were called, and srun runs its command once per node, here. They know nothing of scheduling,
signals or what a real srun accepts: that is for test_slurm_real.py.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

FAKES = {
    "srun": r"""
        case "$*" in *own_address*)
            while [ "${1#--}" != "$1" ]; do shift; done
            exec "$@" ;;
            *" true")
            echo step >>"$RECORD/spent"
            exit ;;
        esac
        printf '%s\0' "$@" >"$RECORD/srun"
        while [ "${1#--}" != "$1" ]; do shift; done
        for node in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do SLURM_NODEID=$node "$@" || code=$?; done
        exit "${code:-0}"
    """,
    "scontrol": r"""
        printf '%s\0' "$@" >>"$RECORD/scontrol"
        case "$1 $2" in
            "show hostnames") printf 'n7\nn8\n' ;;
            "show node") echo "NodeName=$4 Arch=x86_64 NodeAddr=10.0.0.8 NodeHostName=$4 Port=0" ;;
            "show job")
                printf '   JobState=%s Reason=None\n   Requeue=1 Restarts=%s BatchFlag=1\n' \
                    "${STATE:-RUNNING}" "${RESTARTS:-${SLURM_RESTART_COUNT:-0}}"
                printf '   Comment=StdOut=no\n   StdOut=%s/it'"'"'s 5.log\n' "$RECORD" ;;
            requeue*) exit "${NO_REQUEUE:-0}" ;;
        esac
    """,
    "getent": '[ "$2" != "${UNKNOWN_HOST:-}" ]',
    "python": r"""
        case "$2" in *own_address)
            printf '%s\0' "$@" >"$RECORD/asked"
            if [ -n "${NO_ROUTE:-}" ]; then exit 2; fi
            echo "${HEAD:-10.0.0.7}"
            exit ;;
        esac
        printf '%s\0' "$@" >"$RECORD/python$SLURM_NODEID"
        printf '%s\0' "$OMP_NUM_THREADS" >"$RECORD/threads"
        if [ -n "${SAID:-}" ]; then echo "$SAID ${OF:-${SLURM_RESTART_COUNT:-0}}" >"$MTUNET_EXIT_FILE"; fi
        exit "${EXIT_CODE:-0}"
    """,
    "sleep": "",
    "timeout": 'exit "${LOST:-0}"',
}


class Cluster:
    """Runs a batch script as the first node of a job would, and reads what the fakes recorded."""

    def __init__(self, folder: Path, script: Path) -> None:
        self.folder = folder
        self.script = script
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name, body in FAKES.items():
            self.add(name, body)

    def add(self, name: str, body: str) -> Path:
        """A command ``name`` on PATH that runs the shell script ``body``."""
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        path.chmod(0o755)
        return path

    def run(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """``bash SCRIPT words...`` in a job of one node with 4 CPUs, unless ``variables`` say otherwise."""
        job = {"SLURM_JOB_ID": "42", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n7", "SLURM_CPUS_ON_NODE": "4"}
        environment = {"PATH": f"{self.bin}:{os.defpath}", "RECORD": str(self.folder), **job, **variables}
        environment.setdefault("MTUNET_HOME", str(self.script.parents[1]))
        command = ["bash", str(self.script), *words]
        return subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=10)

    def recorded(self, name: str) -> list[str]:
        """The words that the fakes wrote into the file ``name``."""
        return (self.folder / name).read_text(encoding="utf-8").split("\0")[:-1]

    @property
    def started_anything(self) -> bool:
        """Whether srun was called."""
        return (self.folder / "srun").exists()
