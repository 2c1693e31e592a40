"""slurm/train.sbatch under a real Slurm of two and more nodes: whatever happens, the weights of an undisturbed run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import slurm_cluster
import yaml
from slurm_cluster import SlurmCluster, wait_for
from training import assert_same_state, final_state, records

from mtunet_dist import checkpoint

REPOSITORY = Path(__file__).parents[1]
TRAIN = REPOSITORY / "slurm" / "train.sbatch"
EPOCHS, STEPS = 20, 60
TINY = {
    "model": {"name": "mtunet", "widths": [4, 4, 8, 8], "bottleneck": 8, "dropout": 0.1},
    "batch_size": 4,
    "eval_batch_size": 2,
    "eval_every_epochs": 0,
    "device": "cpu",
    "epochs": EPOCHS,
    "checkpoint": {"every_epochs": 2},
    "log": {"pictures": 0, "every_steps": 1},
    "optim": {"lr": 0.003},
}
# Until a job is requeued each step takes PACE seconds, so that there is time to disturb it.
PACED = """\
import os, time
if "LOCAL_RANK" in os.environ and "SLURM_RESTART_COUNT" not in os.environ:
    from mtunet_dist.tracking import Tracker
    steps = Tracker.steps
    def slow(self, done, report):
        steps(self, done, report)
        time.sleep(float(os.environ.get("PACE", "0")))
    Tracker.steps = slow
"""


@dataclass
class Site:
    """A cluster, and a folder that stands for the users' shared disk."""

    slurm: SlurmCluster
    folder: Path
    config: Path

    def submit(self, *options: str, name: str, words: tuple[str, ...] = (), pace: float = 0) -> str:
        """sbatch the training ``name`` by hand; its job id."""
        run_dir = f"run_dir={self.folder / name}"
        job = ["sbatch", "--parsable", "--ntasks-per-node=1", *options, str(TRAIN), str(self.config), run_dir, *words]
        return self.slurm.call(*job, cwd=self.folder, PACE=str(pace), **self.variables)

    @property
    def variables(self) -> dict[str, str]:
        """The environment of a submission."""
        path = os.pathsep.join([str(self.folder / "paced"), str(REPOSITORY)])
        return {"MTUNET_HOME": str(REPOSITORY), "MTUNET_PYTHON": sys.executable, "PYTHONPATH": path}

    def wait_for_step(self, name: str, step: int) -> None:
        """Return once the training has reported ``step``."""
        file = self.folder / name / "metrics.jsonl"
        wait_for(lambda: file.is_file() and len(file.read_text().splitlines()) >= step, lambda: f"no {file}", 120)

    def check(self, name: str, whole: checkpoint.State) -> None:
        """The run ended with the state of an undisturbed one, and reported each step once."""
        assert_same_state(final_state(self.folder / name), whole)
        assert [r["step"] for r in records(self.folder / name, "train")] == list(range(1, STEPS + 1))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Iterator[Site]:
    """The cluster of these tests."""
    with slurm_cluster.started() as slurm:
        folder = tmp_path_factory.mktemp("shared")
        config = folder / "tiny.yaml"
        data = {"root": str(prepared), "threads": 1, "augment": {"flip": True}}
        config.write_text(yaml.safe_dump({**TINY, "data": data}), encoding="utf-8")
        (folder / "paced").mkdir()
        (folder / "paced" / "sitecustomize.py").write_text(PACED, encoding="utf-8")
        yield Site(slurm, folder, config)


@pytest.fixture(scope="module")
def over_time(site: Site) -> str:
    """A job that reaches its time limit. Slurm looks at limits twice a minute, so it begins before the other tests."""
    return site.submit("--nodes=1", "--time=1", "--signal=USR1@40", name="over time", pace=0.5)


@pytest.fixture(scope="module")
def whole(site: Site, over_time: str) -> checkpoint.State:
    """How an undisturbed training of two processes ends: plain torchrun on one machine."""
    words = ["--standalone", "--nproc-per-node=2", "-m", "mtunet_dist.train", str(site.config)]
    environment = {**site.slurm.environment, **site.variables}
    command = [sys.executable, "-m", "torch.distributed.run", *words, f"run_dir={site.folder / 'whole'}"]
    subprocess.run(command, env=environment, cwd=site.folder, check=True, timeout=240)
    return final_state(site.folder / "whole")


def test_two_nodes_train_as_torchrun_does_on_one(site: Site, whole: checkpoint.State) -> None:
    job = site.submit("--nodes=2", name="two nodes")
    assert site.slurm.wait(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED"
    site.check("two nodes", whole)
    log = (site.folder / f"mtunet-{job}.log").read_text()
    assert "2 x cpu" in log and "evaluation: miou" in log
    assert (site.folder / f"mtunet-{job}.node1.log").is_file()


def test_a_requeued_job_goes_on(site: Site, whole: checkpoint.State) -> None:
    job = site.submit("--nodes=2", name="requeued", pace=0.5)
    site.wait_for_step("requeued", 5)
    site.slurm.call("scontrol", "requeue", job)
    assert site.slurm.wait(job, "COMPLETED", "FAILED")["Restarts"] == "1"
    site.check("requeued", whole)


def test_a_signal_sends_the_job_back_into_the_queue(site: Site, whole: checkpoint.State) -> None:
    job = site.submit("--nodes=2", name="signalled", words=("data.loader=torch",), pace=0.5)
    site.wait_for_step("signalled", 5)
    site.slurm.call("scancel", "--signal=USR1", job)
    assert site.slurm.wait(job, "COMPLETED", "FAILED")["Restarts"] == "1"
    site.check("signalled", whole)
    assert "USR1 received: stopped after step" in (site.folder / f"mtunet-{job}.log").read_text()
