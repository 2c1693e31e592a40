"""slurm/sweep.sbatch, with fakes for Slurm's commands, for Ray and for the sweep."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.slurm_fakes import Cluster
from helpers.training import wait_until

SCRIPT = Path(__file__).parents[2] / "slurm" / "sweep.sbatch"
JOB = str(10**9 + os.getpid())  # Ray's folders in /tmp have its name
FAKES = {
    "srun": """
        while [ "${1#--}" != "$1" ]; do case $1 in --nodelist=*) export NODE="${1#*=}" ;; esac; shift; done
        exec "$@"
    """,
    # Ray or the sweep, both until scancel, or until they end by themselves.
    "python": r"""
        case "$*" in
            *own_address*) echo "$HEAD" ;;
            *ray.scripts*)
                printf '%s\0' "$@" >"$RECORD/ray-$NODE"
                for folder; do :; done
                mkdir -p "${folder#*=}/session_latest/logs"
                echo "last words of $NODE" >"${folder#*=}/session_latest/logs/raylet.out"
                [ "$NODE" != "${RAY_ENDS:-}" ] || exit 1 ;;
            *)
                printf '%s\0' "$@" >"$RECORD/sweep"
                [ -z "${SWEEP_ENDS:-}" ] || exit "$SWEEP_ENDS" ;;
        esac
        case "$2" in *own_address) exit ;; esac
        until [ -e "$RECORD/cancelled" ]; do /bin/sleep 0.05; done
    """,
    "scancel": '>"$RECORD/cancelled"',
    "sleep": "/bin/sleep 0.1",
}


class Sweep(Cluster):
    """A job of two nodes, n7 and n8, whose first has the address ``head``."""

    head = f"127.{1 + os.getpid() // 65536}.{os.getpid() // 256 % 256}.{os.getpid() % 256}"  # of this process alone
    port = 15000 + 2 * (int(JOB) % 8500)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, SCRIPT)
        for name, body in FAKES.items():
            self.add(name, body)
        (folder / "it's 5.log").write_text("trial 00000  epoch 1\ntrial 00000  finished\n", encoding="utf-8")

    def sweep(self, **variables: str) -> tuple[int, str]:
        """The exit code of a job, and what it said."""
        (self.folder / "cancelled").unlink(missing_ok=True)
        nodes = {"SLURM_JOB_ID": JOB, "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[7-8]", "HEAD": self.head}
        done = self.run("sweep.yaml", "trials=3", **nodes, **variables)
        assert not list(Path("/tmp").glob(f"mt{JOB}*"))
        return done.returncode, done.stdout + done.stderr

    @property
    def requeues(self) -> int:
        """How often it went back into the queue."""
        return self.recorded("scontrol").count("requeue")


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Sweep]:
    """A job whose head listens, as Ray's would."""
    with socket.create_server((Sweep.head, Sweep.port)):
        yield Sweep(tmp_path)
        (tmp_path / "cancelled").touch()  # nothing goes on after a failure either


def test_a_sweep_has_a_ray_of_all_nodes_and_its_exit_code_is_the_jobs(job: Sweep) -> None:
    assert job.sweep(SWEEP_ENDS="0")[0] == 0
    address = f"--address={job.head}:{job.port}"
    assert job.recorded("sweep") == [
        *("-m", "mtunet_dist.sweep", address, "--nodes=2", "sweep.yaml", "trials=3"),
    ]
    head, other = (job.recorded(f"ray-{node}") for node in ("n7", "n8"))
    assert "--head" in head and f"--port={job.port}" in head
    assert "--head" not in other and address in other
    assert head[-1] != other[-1] and head[-1].startswith("--temp-dir=/tmp/mt")  # nodes may be one host
    assert job.sweep(SWEEP_ENDS="2")[0] == 2
    assert job.sweep(SWEEP_ENDS="1")[0] == 1
    assert job.requeues == 0


def test_where_ray_ends_on_a_node_the_job_goes_back_into_the_queue_but_twice(job: Sweep) -> None:
    for _ in range(3):
        code, said = job.sweep(RAY_ENDS="n8")
    assert (code, job.requeues) == (1, 2)
    log = job.folder / "it's 5.ray-n8.log"
    assert f"error: Ray on n8 ended: see {log}" in said
    assert "error: Ray on n8 ended; three times at the same point, 2 lines of trials: not queued again" in said
    assert "last words of n8" in log.read_text(encoding="utf-8")


def test_where_slurm_does_not_requeue_a_sweep_without_its_ray_ends(job: Sweep) -> None:
    code, said = job.sweep(RAY_ENDS="n7", NO_REQUEUE="1")
    assert code == 1
    assert "error: Ray on n7 ended at 2 lines of trials; Slurm does not requeue this job: submit it again" in said


def test_a_sweep_that_fails_as_ray_ends_goes_on_but_one_of_bad_input_does_not(job: Sweep) -> None:
    assert "Ray on n8 ended at 2 lines of trials; queued again" in job.sweep(RAY_ENDS="n8", SWEEP_ENDS="1")[1]
    assert job.sweep(RAY_ENDS="n8", SWEEP_ENDS="2")[0] == 2
    assert job.requeues == 1


def test_a_sweep_whose_node_is_lost_goes_back_into_the_queue(job: Sweep) -> None:
    assert "a node is lost at 2 lines of trials; queued again" in job.sweep(SWEEP_ENDS="1", LOST="1")[1]


def test_a_sweep_that_slurm_has_queued_again_does_not_end_what_the_next_restart_has_begun(job: Sweep) -> None:
    """scancel would: it ends all steps of the job."""
    nodes = {"SLURM_JOB_ID": JOB, "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[7-8]", "HEAD": job.head}
    assert job.run("sweep.yaml", **nodes, SWEEP_ENDS="1", RESTARTS="1").returncode == 1
    assert not (job.folder / "cancelled").exists() and job.requeues == 0
    (job.folder / "cancelled").touch()
    wait_until(lambda: not list(Path("/tmp").glob(f"mt{JOB}*")), patience_s=10)
