"""slurm/submit.py and slurm/status.py, without Slurm: what is rendered, refused, recorded and shown."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.training import MakeConfig, final_state
from mtunet_dist import status, submit
from mtunet_dist import train as training_loop
from mtunet_dist.errors import InputError, MTUNetError
from mtunet_dist.runs import tracking
from mtunet_dist.slurm.job_script import Job, Options, render
from mtunet_dist.train import train

TEMPLATE = '#!/bin/bash\n# For hands.\n#SBATCH --requeue\n#SBATCH --signal=USR1@120\nset -eu\nbody "$@"\n'
HOSTILE = 'it\'s $(touch hit); "ü" `x` \\ %j #'


@pytest.fixture
def config_file(tmp_path: Path, overrides: list[str]) -> Path:
    """The tiny config as a file."""
    file = tmp_path / "tiny.yaml"
    file.write_text(submit.to_yaml(submit.load_config(None, overrides)), encoding="utf-8")
    return file


def job(options: Options, **more: Any) -> Job:
    given = {"template": TEMPLATE, "home": Path("/opt/mtunet"), "folder": Path("/work"), "python": "/venv/bin/python"}
    return Job(**{**given, "log": Path("/disk/run/slurm/job-%j.log"), "words": ("a.yaml",), "options": options, **more})


def test_the_script_of_a_plain_training() -> None:
    options = Options(nodes=2, gpus=4, cpus=32, time="2-00:00:00", partition="gpu", account="x1", name="demo")
    assert render(job(options, origin="code 123")) == (
        "#!/bin/bash\n"
        "# For hands.\n"
        "#SBATCH --requeue\n"
        "#SBATCH --signal=USR1@120\n"
        "#SBATCH --job-name=demo\n"
        "#SBATCH --chdir=/work\n"
        "#SBATCH --output=/disk/run/slurm/job-%j.log\n"
        "#SBATCH --nodes=2\n"
        "#SBATCH --gpus-per-node=4\n"
        "#SBATCH --cpus-per-task=32\n"
        "#SBATCH --time=2-00:00:00\n"
        "#SBATCH --partition=gpu\n"
        "#SBATCH --account=x1\n"
        "#SBATCH --signal=USR1@120\n"
        "# code 123\n"
        "export MTUNET_HOME=/opt/mtunet\n"
        "export MTUNET_PYTHON=/venv/bin/python\n"
        "job_output=/disk/run/slurm/job-$SLURM_JOB_ID.log\n"
        "set -- a.yaml\n"
        "set -eu\n"
        'body "$@"\n'
    )


def test_the_script_of_an_array_in_a_container_with_setup_lines() -> None:
    options = Options(
        processes=2,
        setup=("module load cuda", ". venv/bin/activate"),
        container_image="nvcr.io#nvidia/pytorch:26.01-py3",
        container_mounts=("/data:/data",),
        at_once=1,
        requeue=False,
        sbatch=("--exclusive", "--comment=a b#c"),
    )
    members = [("seed=0", "run_dir=r/seed=0"), ("seed=1", "run_dir=r/it's")]
    text = render(job(options, members=members))
    added = text.partition("#SBATCH --signal=USR1@120\n")[2].partition("set -eu")[0]
    mounts = "/data:/data,/work:/work"
    assert added == (
        "#SBATCH --chdir=/work\n"
        "#SBATCH --output=/disk/run/slurm/job-%j.log\n"
        "#SBATCH --nodes=1\n"
        "#SBATCH --signal=USR1@120\n"
        "#SBATCH --array=0-1%1\n"
        "#SBATCH --no-requeue\n"
        "#SBATCH --exclusive\n"
        '#SBATCH --comment="a b\\#c"\n'
        "# \n"
        "module load cuda\n"
        ". venv/bin/activate\n"
        "srun() { command srun '--container-image=nvcr.io#nvidia/pytorch:26.01-py3' "
        f'--container-mounts={mounts} --container-workdir=/work "$@"; }}\n'
        "export MTUNET_HOME=/opt/mtunet\n"
        "export MTUNET_PYTHON=/venv/bin/python\n"
        "export MTUNET_CPU_PROCS=2\n"
        "export MTUNET_CONTAINER='nvcr.io#nvidia/pytorch:26.01-py3'\n"
        "job_output=/disk/run/slurm/job-$SLURM_JOB_ID.log\n"
        "set -- a.yaml\n"
        'case "$SLURM_ARRAY_TASK_ID" in\n'
        '  0) set -- "$@" seed=0 run_dir=r/seed=0 ;;\n'
        "  1) set -- \"$@\" seed=1 'run_dir=r/it'\"'\"'s' ;;\n"
        "esac\n"
    )


def test_hostile_words_survive_bash(tmp_path: Path) -> None:
    words = (HOSTILE, "", "*", f"run_dir={HOSTILE}")
    template = TEMPLATE.replace('body "$@"', 'printf \'%s\\0\' "$@" "$MTUNET_HOME"')
    text = render(job(Options(name=HOSTILE), template=template, words=words, home=Path(HOSTILE), origin=HOSTILE))
    done = subprocess.run(
        ["bash", "-c", text], cwd=tmp_path, env={"SLURM_JOB_ID": "1"}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\0")[:-1] == [*words, HOSTILE]
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="more than one line"):
        render(job(Options(name="a\n#SBATCH --uid=0")))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--nodess=2"], ["--nodess", "Did you mean '--nodes'", "--partition"]),
        (["--nodes=0"], ["nodes=0", "at least 1"]),
        (["--gpus=two"], ["gpus", "two"]),
        (["--time=86400"], ["time=86400", "HH:MM:SS"]),
        (["--grid=optim.lr=3"], ["optim.lr=3", "key=[value,value]"]),
        (["--grid=optim.lrr=[3]"], ["optim.lrr", "Did you mean"]),
        (["--seeds=0,-1"], ["seed=-1"]),
        (["--seeds=a"], ["seeds"]),
        (["--nodes=3"], ["batch_size", "3"]),
        (["--gpus=1"], ["device=cpu", "gpus=1"]),
        (["data.root=/no/such"], ["/no/such", "does not exist"]),
        (["--chain=2", "--seeds=1"], ["chain", "arrays"]),
        (["--local", "--nodes=2"], ["--local"]),
        (["--profile=/no/such.yaml"], ["/no/such.yaml", "does not exist"]),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_written(
    config_file: Path, words: list[str], expected: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        _, options, rest = submit.parse(["train", str(config_file), *words])
        submit.train_work(rest, options)
    for text in expected:
        assert text in str(caught.value)
    assert not (config_file.parent / "run").exists()


def test_the_command_line_has_the_last_word_over_a_profile(tmp_path: Path) -> None:
    profile = tmp_path / "cluster.yaml"
    profile.write_text('{partition: gpu, account: x1, time: "24:00:00", setup: [module load a], requeue: false}')
    words = [
        "train",
        "a.yaml",
        f"--profile={profile}",
        "epochs=3",
        "--partition=dev",
        "--sbatch=--exclusive",
        "--requeue",
    ]
    _, options, rest = submit.parse(words)
    assert (options.partition, options.account, options.time) == ("dev", "x1", "24:00:00")
    assert (options.setup, options.sbatch, options.requeue) == (("module load a",), ("--exclusive",), True)
    assert rest == ["a.yaml", "epochs=3"]
    profile.write_text("partion: gpu")
    with pytest.raises(InputError, match=r"partion.*Did you mean 'partition'.*Available"):
        submit.parse(words)


def test_members_train_what_was_checked(config_file: Path, tmp_path: Path) -> None:
    """A member's ``model.name`` drops the file's options of the model, not those of the command line."""
    words = [str(config_file), "model.widths=[8,8,8,8]", "weighting.lr=0.5"]
    grid = ["--grid=model.name=[st_unet,mtunet]", "--grid=weighting.name=[learned,uncertainty]"]
    _, options, rest = submit.parse(["train", *words, *grid])
    work = submit.train_work(rest, options)
    script, _ = submit.write(work, options)
    assert len(work.members) == 4
    for member in work.members:
        checked = submit.load_config(words[0], [*words[1:], *member])
        assert submit.load_config(script.with_suffix(".yaml"), [*work.words, *member]) == checked
        assert checked.model["widths"] == (8, 8, 8, 8) and checked.weighting["lr"] == 0.5


def test_words_of_reproduce_are_passed_on() -> None:
    _, options, rest = submit.parse(["reproduce", "table2", "--budget", "short", "--time=1:00:00", "--seeds=5"])
    work = submit.reproduce_work(rest, options)
    assert work.words == ("table2", "--budget", "short", "--seeds=5")
    assert (str(work.folder), work.variables) == ("runs/reproduce,table2", {"MTUNET_MODULE": "mtunet_dist.reproduce"})


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["reproduce", "tabel2"], "unknown table or figure 'tabel2'. Did you mean 'table2'"),
        (["reproduce", "--budget", "smoke", "table2"], "name the table or figure first, before --budget"),
        (["reproduce", "table2", "--seeds=0,1"], "reproduce takes their number"),
        (["reproduce", "table2", "--grid=optim.lr=[1,2]"], "for train, not for reproduce"),
        (["sweep", "tune/lr.yaml", "--seeds=0,1"], "for train, not for sweep"),
    ],
)
def test_what_does_not_suit_the_verb_is_refused(words: list[str], expected: str) -> None:
    with pytest.raises(InputError, match=re.escape(expected)):
        args, options, rest = submit.parse(words)
        submit.VERBS[args.verb](rest, options)


def test_a_sweep_is_checked_and_finds_its_config(config_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    space = {"optim.lr": {"choice": [0.1, 0.2]}}
    sweep = {"name": "s", "run_dir": str(tmp_path / "s"), "config": "tiny.yaml", "space": space, "searcher": "grid"}
    file.write_text(yaml.safe_dump(sweep))
    work = submit.sweep_work([str(file)], Options())
    assert (work.template, yaml.safe_load(work.config)["config"]) == ("sweep.sbatch", str(config_file))
    script, text = submit.write(work, Options(signal_s=300))
    assert text.count("#SBATCH --signal=") == 2 and "#SBATCH --signal=B:USR1@300\n" in text  # the script alone gets it
    assert text.count(f"set -- {script.with_suffix('.yaml')}\n") == 1
    with pytest.raises(InputError, match="gpus_per_worker=1"):
        submit.sweep_work([str(file), "gpus_per_worker=1"], Options())
    with pytest.raises(InputError, match="gpus=4, but gpus_per_worker=0"):
        submit.sweep_work([str(file)], Options(gpus=4))


def test_a_chain_of_jobs_is_recorded_with_config_and_code(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "bin" / "sbatch"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/calls\necho "$(wc -l <{tmp_path}/calls);cluster"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(fake.parent), prepend=":")
    _, options, rest = submit.parse(["train", str(config_file), "epochs=7", "--chain=3"])
    script, text = submit.write(submit.train_work(rest, options), options)
    assert "#SBATCH --no-requeue\n" in text
    assert submit.submit(script, options) == ["1", "2", "3"]
    after = [line.split()[1:-1] for line in (tmp_path / "calls").read_text().splitlines()]
    assert after == [[], *([f"--dependency=afternotok:{n}", "--kill-on-invalid-dep=yes"] for n in (1, 2))]
    assert script == tmp_path / "run" / "slurm" / "1.sbatch"
    assert submit.load_config(script.with_suffix(".yaml")).epochs == 7
    record = json.loads(script.with_suffix(".json").read_text())
    assert record["jobs"] == ["1", "2", "3"] and {"git", "command", "options"} <= record.keys()
    assert submit.write(submit.train_work(rest, options), options)[0].name == "2.sbatch"

    fake.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2\nexit 1\n")
    with pytest.raises(MTUNetError, match="invalid partition"):
        submit.submit(script, options)

    fake.write_text('#!/bin/sh\n[ $# = 2 ] && echo 7 && exit\necho "sbatch: error: too many jobs" >&2\nexit 1\n')
    with pytest.raises(MTUNetError, match="too many jobs; of the chain only 7 are queued"):
        submit.submit(script, options)
    assert json.loads(script.with_suffix(".json").read_text())["jobs"] == ["7"]


@pytest.mark.slow
def test_the_same_script_runs_without_slurm(config_file: Path, tmp_path: Path) -> None:
    words = ["train", str(config_file), f"run_dir={tmp_path / 'a b'}", "epochs=1", "--local", "--processes=2"]
    command = [sys.executable, submit.__file__, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 x cpu" in done.stdout
    assert final_state(tmp_path / "a b")["step"] == 3
    assert status.status_of(tmp_path / "a b", {}, set()).state == "finished"


def test_states_of_a_run(make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config("epochs=3", "log.every_steps=2")
    run_dir = Path(config.run_dir)
    steps = tracking.Tracker.log_steps
    seen = []

    def look(self: tracking.Tracker, done: int, report: tracking.StepReport) -> None:
        steps(self, done, report)
        seen.append(status.status_of(run_dir, {}, status.locked_files()).state)
        if done == 4:
            signal.raise_signal(signal.SIGUSR1)

    monkeypatch.setattr(tracking.Tracker, "log_steps", look)
    with pytest.raises(MTUNetError):
        train(config)
    assert set(seen) == {"running"}
    stopped = status.status_of(run_dir, {}, status.locked_files())
    assert (stopped.state, stopped.epoch, stopped.epochs) == ("stopped", 2, 3)
    assert stopped.metric.startswith("miou ")
    (run_dir / "slurm").mkdir()
    (run_dir / "slurm" / "1.json").write_text('{"jobs": ["41"], "started": "2000"}')
    environment = json.loads((run_dir / "environment.json").read_text())
    assert environment["slurm_job"] is None and status.job_of(run_dir) == "41"
    assert status.status_of(run_dir, {"41": "PENDING"}, set()).state == "queued"
    assert status.status_of(run_dir, {"41": "COMPLETING"}, set()).state == "running"
    (run_dir / "slurm" / "job-41.exit").write_text("1 step_00000004.pt\n")
    assert status.status_of(run_dir, {}, set()).state == "failed"
    (run_dir / "environment.json").write_text(json.dumps({**environment, "slurm_job": "42"}))
    assert status.job_of(run_dir) == "42"
    assert list(status.runs(tmp_path)) == [run_dir]
    (run_dir / "environment.json").write_text("")  # the disk was full
    (run_dir / "config.yaml").write_text("")
    assert status.status_of(run_dir, {}, set()).job == "41"


def test_a_run_is_finished_when_its_last_evaluation_is(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("epochs=1", "log.every_steps=100")
    with monkeypatch.context() as patch:
        patch.setattr(training_loop, "_report", asked_before(training_loop._report))
        with pytest.raises(MTUNetError, match="stopped after step 3"):
            train(config)
    assert status.status_of(Path(config.run_dir), {}, set()).state == "stopped"
    train(config)
    assert status.status_of(Path(config.run_dir), {}, set()).state == "finished"


def asked_before(report: Callable[..., Any]) -> Callable[..., Any]:
    """``report``, with a request to stop coming just before."""

    def wrapped(*args: Any) -> Any:
        signal.raise_signal(signal.SIGUSR1)
        return report(*args)

    return wrapped
