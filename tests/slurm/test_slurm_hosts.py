"""Slurm over hosts that share nothing but disks: how they meet, whatever their names mean, and one that is cut off.

tests/slurm/test_slurm_real.py has the rest of what happens under Slurm.
"""

from __future__ import annotations

import csv
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from test_slurm_real import STEPS, TINY

from helpers import slurm_hosts
from helpers.slurm_cluster import wait_for
from helpers.slurm_hosts import REPOSITORY, SlurmHosts
from helpers.training import assert_same_state, final_state, on_two_ranks, paced, records
from mtunet_dist.config import load_config
from mtunet_dist.runs import checkpoint
from mtunet_dist.train import train

pytestmark = pytest.mark.slow
PACED = paced(restarts=2)  # so that there is time to disturb a training


@dataclass
class Site:
    """A cluster, and a folder that stands for the users' shared disk."""

    slurm: SlurmHosts
    folder: Path

    def submit(self, script: str, *words: str, pace: float = 0) -> str:
        """sbatch a script of the repository over two nodes; its job id."""
        path = os.pathsep.join([str(self.folder / "paced"), str(REPOSITORY)])
        environment = {"MTUNET_HOME": str(REPOSITORY), "MTUNET_PYTHON": sys.executable, "PYTHONPATH": path}
        options = ["--nodes=2", "--cpus-per-task=1", *(word for word in words if word.startswith("--"))]
        job = ["sbatch", "--parsable", *options, str(REPOSITORY / "slurm" / script)]
        given = [word for word in words if not word.startswith("--")]
        return self.slurm.call(*job, *given, cwd=self.folder, PACE=str(pace), **environment)

    def train(self, name: str, *options: str, pace: float = 0) -> str:
        """Submit the training ``name``; its job id."""
        return self.submit("train.sbatch", *options, "tiny.yaml", f"run_dir={self.folder / name}", pace=pace)

    def sweep(self, name: str, *options: str) -> str:
        """Submit a sweep of one trial, of two processes, which are on two nodes; its job id."""
        sweep = {
            "name": name,
            "run_dir": str(self.folder / name),
            "config": "tiny.yaml",
            "overrides": ["epochs=1"],
            "space": {"optim.lr": {"choice": [1e-3]}},
            "searcher": "grid",
            "workers_per_trial": 2,
            "objective": {"metrics": ["depth_abs"]},
        }
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(sweep), encoding="utf-8")
        return self.submit("sweep.sbatch", *options, f"{name}.yaml")

    def log(self, job: str, kind: str = "mtunet") -> str:
        """What the job has said so far."""
        file = self.folder / f"{kind}-{job}.log"
        return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""

    def steps(self, name: str) -> int:
        """The newest step that a training has reported."""
        file = self.folder / name / "metrics.jsonl"
        done = records(self.folder / name, "train") if file.is_file() and file.read_text().endswith("\n") else []
        return int(done[-1]["step"]) if done else 0

    def wait_for_step(self, job: str, name: str, step: int) -> None:
        """Return once the training has reported ``step``."""
        wait_for(lambda: self.steps(name) >= step, lambda: self.log(job), 240)

    def nodes(self, job: str) -> list[str]:
        """Those that the job has."""
        return self.slurm.call("scontrol", "show", "hostnames", self.slurm.job(job)["NodeList"]).split()

    def check_training(self, job: str, name: str, whole: checkpoint.State) -> None:
        """It ended with the state of an undisturbed one, and reported each step once."""
        ended = self.slurm.wait(job, "COMPLETED", "FAILED")
        assert ended["JobState"] == "COMPLETED", self.log(job)
        assert_same_state(final_state(self.folder / name), whole)
        assert [r["step"] for r in records(self.folder / name, "train")] == list(range(1, STEPS + 1))

    def check_sweep(self, job: str, name: str, *nodes: str) -> None:
        """Its trial was trained, on both its nodes."""
        ended = self.slurm.wait(job, "COMPLETED", "FAILED")
        said = self.log(job, "mtunet-sweep")
        assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), said
        listed = ", ".join(rf"{node} 10\.77\.0\.{node[1:]} \(1 CPUs, 0 GPUs\)" for node in nodes)
        assert re.search(rf"has 2 nodes: {listed}\n", said), said
        with (self.folder / name / "results.csv").open(encoding="utf-8") as file:
            assert [row["status"] for row in csv.DictReader(file)] == ["finished"]
        assert "2 x cpu" in (self.folder / name / "trials" / "00000" / "log.txt").read_text()


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Path:
    """The users' shared disk: a config over the tiny dataset."""
    folder = tmp_path_factory.mktemp("disk")
    data = {"root": str(prepared), "threads": 1, "augment": {"flip": True}}
    config = {**TINY, "data": data}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (folder / "paced").mkdir()
    (folder / "paced" / "sitecustomize.py").write_text(PACED, encoding="utf-8")
    return folder


@dataclass
class Jobs:
    """What runs on the hosts that are named as on Debian, all begun together."""

    site: Site
    disturbed: str
    training: str
    sweep: str


@pytest.fixture(scope="module")
def debian(disk: Path, prepared: Path) -> Iterator[Jobs]:
    """Five hosts: a training and a sweep on two of them, one that is to be disturbed has the others for itself."""
    with slurm_hosts.started(5, "debian", disk, prepared) as slurm:
        site = Site(slurm, disk)
        disturbed = site.train("disturbed", "--exclusive", pace=0.5)
        others = "--nodelist=n3,n4"
        yield Jobs(site, disturbed, site.train("debian", others), site.sweep("swept", others))


@pytest.fixture(scope="module")
def whole(disk: Path) -> checkpoint.State:
    """How an undisturbed training of two processes ends."""
    config = load_config(disk / "tiny.yaml", [f"run_dir={disk / 'whole'}"])
    on_two_ranks(train, config)
    return final_state(config.run_dir)


def test_a_job_goes_on_where_a_node_fails_and_where_its_first_is_cut_off(
    debian: Jobs, request: pytest.FixtureRequest
) -> None:
    """The second: it does not know that its time is over. What it does then changes nothing."""
    site, job, name = debian.site, debian.disturbed, "disturbed"
    site.wait_for_step(job, name, 8)
    _, second = site.nodes(job)
    site.slurm.do("kill", second)
    wait_for(lambda: "restart 1: 2 x 1" in site.log(job), lambda: site.log(job), 120)
    assert "does not requeue" not in site.log(job)
    site.slurm.do("boot", second)
    wait_for(lambda: "; resuming at step " in site.log(job), lambda: site.log(job), 120)
    site.wait_for_step(job, name, int(site.log(job).rpartition("; resuming at step ")[2].partition(";")[0]) + 2)
    first, _ = site.nodes(job)
    site.slurm.do("cut", first)
    wait_for(lambda: "restart 2: 2 x 1" in site.log(job), lambda: site.log(job), 120)
    wait_for(lambda: "has taken over" in site.log(job), lambda: site.log(job), 120)
    site.slurm.do("heal", first)
    whole = request.getfixturevalue("whole")  # while the job goes on
    site.check_training(job, name, whole)
    assert site.slurm.job(job)["Restarts"] == "2"
    assert f"waiting until job {job}, restart 1, process " in site.log(job)


def test_nodes_whose_own_names_mean_the_loopback_train_together(debian: Jobs, whole: checkpoint.State) -> None:
    debian.site.check_training(debian.training, "debian", whole)


def test_a_sweep_has_both_of_them(debian: Jobs) -> None:
    debian.site.check_sweep(debian.sweep, "swept", "n3", "n4")


def test_launchers_started_by_hand_find_each_other_by_the_heads_name(debian: Jobs, whole: checkpoint.State) -> None:
    site = debian.site
    command = [sys.executable, str(REPOSITORY / "launch" / "nodes.py"), "--nproc=1", "--head=n3", "--nnodes=2"]
    words = ["tiny.yaml", f"run_dir={site.folder / 'by hand'}"]
    started = [site.slurm.start(host, *command, *words, cwd=site.folder) for host in ("n3", "n4")]
    errors = [process.communicate(timeout=240)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], errors
    assert_same_state(final_state(site.folder / "by hand"), whole)


@pytest.mark.parametrize("names", ["none", "clean"])
def test_nodes_without_names_and_with_clean_ones_train_together(
    disk: Path, prepared: Path, whole: checkpoint.State, names: str
) -> None:
    with slurm_hosts.started(2, names, disk, prepared) as slurm:
        site = Site(slurm, disk)
        training, sweep = site.train(names), site.sweep(f"swept {names}") if names == "none" else None
        site.check_training(training, names, whole)
        if sweep is not None:
            site.check_sweep(sweep, f"swept {names}", "n1", "n2")
