"""slurm/train.sbatch under a real Slurm of two and more nodes: whatever happens, the weights of an undisturbed run."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from conftest import write_folder_source
from helpers import slurm_cluster
from helpers.slurm_cluster import SlurmCluster, wait_for
from helpers.training import assert_same_state, final_state, paced, records
from mtunet_dist.prepare import prepare
from mtunet_dist.runs import checkpoint
from mtunet_dist.status import job_of, status_of
from mtunet_dist.status import runs as runs_under

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parents[2]
TRAIN = REPOSITORY / "slurm" / "train.sbatch"
EPOCHS, STEPS = 12, 36
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
PACED = paced(restarts=1)  # so that there is time to disturb a training


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
    return site.submit("--nodes=2", "--time=3", "--signal=USR1@60", name="over time", pace=5)


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


def test_a_cancelled_job_does_not_come_back(site: Site) -> None:
    job = site.submit("--nodes=1", name="cancelled", pace=0.5)
    site.wait_for_step("cancelled", 1)
    site.slurm.call("scancel", job)
    ended = site.slurm.wait(job, "CANCELLED")
    assert ended["Restarts"] == "0"
    assert final_state(site.folder / "cancelled")["step"] < STEPS


def test_a_job_that_fails_does_not_come_back(site: Site) -> None:
    job = site.submit("--nodes=2", name="failed", words=("optim.lr=1e30",))
    ended = site.slurm.wait(job, "FAILED", "COMPLETED")
    assert (ended["JobState"], ended["Restarts"], ended["ExitCode"]) == ("FAILED", "0", "2:0")
    assert "error: the " in site.slurm.log(ended)


def test_an_array_of_seeds_under_names_that_a_shell_would_act_upon(site: Site) -> None:
    folder = site.folder / 'it\'s $(touch hit); "ü" `touch hit` %j #1'
    words = [str(site.config), f"run_dir={folder}", "epochs=2", "--seeds=0,1,2", "--time=10:00", "--name", "a; b'\" #c"]
    script = str(REPOSITORY / "slurm" / "submit.py")
    said = site.slurm.call(sys.executable, script, "train", *words, cwd=site.folder, **site.variables)
    job = re.search(r"^job (\d+);", said)
    assert job
    states = [site.slurm.wait(f"{job[1]}_{i}", "COMPLETED", "FAILED") for i in range(3)]
    assert [state["JobState"] for state in states] == ["COMPLETED"] * 3, [site.slurm.log(state) for state in states]
    runs = [final_state(folder / f"seed={i}") for i in range(3)]
    assert [run["step"] for run in runs] == [6] * 3
    weights = [next(iter(run["strategy"]["model"].values())) for run in runs]
    assert not weights[0].equal(weights[1]) and not weights[1].equal(weights[2])
    assert not list(site.folder.rglob("hit"))
    found = {(s.folder.name, s.state) for s in (status_of(f, {}, set()) for f in runs_under(folder))}
    assert found >= {("seed=0", "finished"), ("seed=1", "finished"), ("seed=2", "finished")}
    jobs = {job_of(folder / f"seed={i}") for i in range(3)}
    assert len(jobs) == 3 and job[1] in jobs


def submit_sweep(site: Site, name: str, rates: list[float], epochs: int, *options: str) -> str:
    """sbatch a sweep of trainings over two nodes by hand; its job id."""
    sweep = {
        "name": name,
        "run_dir": str(site.folder / name),
        "config": "tiny.yaml",
        "overrides": [f"epochs={epochs}", "eval_every_epochs=1"],
        "space": {"optim.lr": {"choice": rates}},
        "searcher": "grid",
        "objective": {"metrics": ["depth_abs"]},
    }
    (site.folder / f"sweep-{name}.yaml").write_text(yaml.safe_dump(sweep), encoding="utf-8")
    batch = ["sbatch", "--parsable", "--nodes=2", "--cpus-per-task=1", *options, str(TRAIN.with_name("sweep.sbatch"))]
    return site.slurm.call(*batch, f"sweep-{name}.yaml", cwd=site.folder, **site.variables)


def check_sweep(site: Site, job: str, name: str, trials: int, epochs: int) -> None:
    """All its trials were trained to the end, and its Ray is gone."""
    with (site.folder / name / "results.csv").open(encoding="utf-8") as file:
        rows = [(row["status"], row["epoch"]) for row in csv.DictReader(file)]
    assert rows == [("finished", str(epochs))] * trials
    assert not list(Path("/tmp").glob(f"mt{job}.*"))


def starts(site: Site, name: str) -> list[int]:
    """How often each trial of a sweep was started from its beginning."""
    logs = (site.folder / name / "trials").glob("*/log.txt")
    return [log.read_text(encoding="utf-8").count("; starting;") for log in logs]


def test_a_sweep_over_two_nodes_survives_the_end_of_its_script(site: Site) -> None:
    job = submit_sweep(site, "tiny", [1e-3, 1e-2, 3e-3], 4)
    log = site.folder / f"mtunet-sweep-{job}.log"
    wait_for(lambda: log.is_file() and "  finished" in log.read_text(), log.read_text, 240)
    site.slurm.call("scancel", "--batch", "--signal=KILL", job)
    site.slurm.wait(job, "FAILED", "COMPLETING")
    site.slurm.call("scontrol", "requeue", job)
    ended = site.slurm.wait(job, "COMPLETED", "FAILED")
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")
    check_sweep(site, job, "tiny", 3, 4)
    assert sorted(starts(site, "tiny"))[:2] == [1, 1]  # the third may not have had a checkpoint


def test_two_sweeps_share_their_nodes_and_one_loses_its_ray(site: Site) -> None:
    """Ports, folders and tokens are each job's own. Where Ray dies on a node the sweep goes on in a new one."""
    nodes = f"--nodelist={','.join(slurm_cluster.NODES[:2])}"
    epochs = {"one": 12, "other": 3}
    jobs = {name: submit_sweep(site, name, [1e-3, 1e-2], count, nodes) for name, count in epochs.items()}
    logs = {name: site.folder / f"mtunet-sweep-{job}.log" for name, job in jobs.items()}
    wait_for(lambda: logs["one"].is_file() and "trial " in logs["one"].read_text(), logs["one"].read_text, 240)
    site.slurm.kill("raylet", f"/tmp/mt{jobs['one']}.1/")
    for name, job in jobs.items():
        ended = site.slurm.wait(job, "COMPLETED", "FAILED")
        assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", str(int(name == "one"))), logs[name].read_text()
        check_sweep(site, job, name, 2, epochs[name])
    assert starts(site, "other") == [1] * 2
    assert "Ray on n2 ended at " in logs["one"].read_text()
    assert "raylet" in (site.folder / f"mtunet-sweep-{jobs['one']}.ray-n2.log").read_text()


def test_a_table_or_figure_of_the_paper_as_a_job_goes_on(site: Site) -> None:
    source, prepared = site.folder / "seven source", site.folder / "seven"
    write_folder_source(source)
    (source / "dataset.yaml").write_text(yaml.safe_dump({"classes": [f"class {i}" for i in range(7)]}))
    prepare("folder", source, prepared, height=32, width=64, workers=0)  # which every network takes
    out, words = site.folder / "reproduced", ["epochs=4", "device=cpu", "log.every_steps=1", "eval_batch_size=4"]
    command = [sys.executable, str(REPOSITORY / "slurm" / "submit.py"), "reproduce", "figure5", *words]
    options = [f"--cityscapes7={prepared}", f"--out={out}", "--time=10:00"]
    said = site.slurm.call(*command, *options, cwd=site.folder, PACE="0.5", **site.variables)
    job = re.search(r"^job (\d+);", said)
    assert job
    run_dir = out / "smoke" / "cityscapes7" / "mtunet" / "seed0"
    site.wait_for_step(str(run_dir.relative_to(site.folder)), 5)
    site.slurm.call("scancel", "--signal=USR1", job[1])
    ended = site.slurm.wait(job[1], "COMPLETED", "FAILED")
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), site.slurm.log(ended)
    assert re.search(
        r"stopped on request at smoke/cityscapes7/mtunet/seed0/checkpoints/step_\d+.pt; queued", site.slurm.log(ended)
    )
    steps = [record["step"] for record in records(run_dir, "train")]
    assert steps == list(range(1, len(steps) + 1)) and status_of(run_dir, {}, set()).state == "finished"
    assert (out / "smoke" / "figure5.png").is_file()


def test_a_job_over_its_time_limit_goes_on(site: Site, over_time: str, whole: checkpoint.State) -> None:
    ended = site.slurm.wait(over_time, "COMPLETED", "FAILED", "TIMEOUT")
    assert ended["JobState"] == "COMPLETED" and int(ended["Restarts"]) >= 1
    assert "USR1 received: stopped after step" in site.slurm.log(ended)
    site.check("over time", whole)


def test_a_lost_node_is_replaced(site: Site, whole: checkpoint.State) -> None:
    """The last test, as jobs of others that were on the node would be queued again too."""
    job = site.submit("--nodes=2", name="lost", pace=0.5)
    site.wait_for_step("lost", 8)
    nodes = site.slurm.call("scontrol", "show", "hostnames", site.slurm.job(job)["NodeList"]).split()
    site.slurm.kill_node(nodes[1])
    site.slurm.call("scontrol", "update", f"nodename={nodes[1]}", "state=down", "reason=test")
    assert site.slurm.wait(job, "COMPLETED", "FAILED", "NODE_FAIL")["JobState"] == "COMPLETED"
    assert nodes[1] not in site.slurm.job(job)["NodeList"]
    site.slurm.start_node(nodes[1])
    back = ["sinfo", "-h", "-n", nodes[1], "-p", "low", "-t", "idle,mixed", "-o", "%N"]
    wait_for(lambda: bool(site.slurm.call(*back)), lambda: f"{nodes[1]} does not come back", 60)
    site.check("lost", whole)
