"""What a training refuses, says or bears before its first step: tasks without targets, images too small, odd limits."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from helpers.training import MakeConfig, final_state, on_two_ranks
from mtunet_dist import evaluate, submit
from mtunet_dist.config import Config, load_config, save_config
from mtunet_dist.errors import InputError
from mtunet_dist.prepare import prepare
from mtunet_dist.reproduction.budgets import BUDGETS
from mtunet_dist.reproduction.experiments import DATASETS, Row, Target
from mtunet_dist.reproduction.trainings import Setup, plan
from mtunet_dist.runs import checkpoint
from mtunet_dist.slurm.job_script import Options
from mtunet_dist.sweeps import config as sweep_config
from mtunet_dist.train import train

CLASSES = [f"class {i}" for i in range(13)]  # as many as reproduce wants of NYU Depth
Way = Callable[[Config, Path], object]


def write_source(root: Path, height: int, width: int, *, without: str = "", split: str = "") -> None:
    """Four samples in train, two in val and test, without their ``label`` or ``depth``, in one ``split`` or all."""
    random = np.random.default_rng(0)
    for name, count in {"train": 4, "val": 2, "test": 2}.items():
        for i in range(count):
            arrays = {
                "rgb": random.integers(0, 255, (height, width, 3), dtype=np.uint8),
                "label": random.integers(0, 2, (height, width), dtype=np.uint8),
                "depth": random.integers(1000, 5000, (height, width), dtype=np.uint16),
            }
            for part, array in arrays.items():
                if part != without or split not in ("", name):
                    (root / name / part).mkdir(parents=True, exist_ok=True)
                    Image.fromarray(array).save(root / name / part / f"{i}.png")
    (root / "dataset.yaml").write_text(yaml.safe_dump({"classes": CLASSES}), encoding="utf-8")


@pytest.fixture
def make_data(tmp_path: Path) -> Callable[..., Path]:
    def make(height: int = 32, width: int = 48, **without: str) -> Path:
        write_source(tmp_path / "source", height, width, **without)
        prepare("folder", tmp_path / "source", tmp_path / "data", height=height, width=width, workers=0)
        return tmp_path / "data"

    return make


def by_training(config: Config, folder: Path) -> None:
    train(config)


def by_submission(config: Config, folder: Path) -> None:
    save_config(config, folder / "tiny.yaml")
    submit.train_work([str(folder / "tiny.yaml")], Options())


def by_sweep(config: Config, folder: Path) -> None:
    save_config(config, folder / "base.yaml")
    sweep = {"name": "s", "run_dir": str(folder / "sweep"), "config": str(folder / "base.yaml")}
    sweep |= {"trials": 1, "objective": {"metrics": [config.checkpoint.best]}}
    sweep |= {"space": {"optim.lr": {"loguniform": [1e-4, 1e-2]}}}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep), encoding="utf-8")
    loaded = sweep_config.load_sweep(folder / "sweep.yaml")
    sweep_config.check_trials(loaded, folder / "base.yaml")


def by_reproduce(config: Config, folder: Path) -> None:
    roots = dict.fromkeys(DATASETS, config.data.root)
    setup = Setup(folder, "smoke", BUDGETS["smoke"], roots, ("batch_size=2",), 1, validation=True)
    plan(Target("one", (Row("mtunet", "nyuv2"),)), setup)


@pytest.mark.parametrize("way", [by_training, by_submission, by_sweep, by_reproduce])
@pytest.mark.parametrize(
    ("part", "task", "other"), [("depth", "depth", "segmentation"), ("label", "segmentation", "depth")]
)
def test_a_task_without_targets_is_refused_with_the_remedy(
    make_config: MakeConfig,
    make_data: Callable[..., Path],
    tmp_path: Path,
    way: Way,
    part: str,
    task: str,
    other: str,
) -> None:
    config = make_config(f"data.root={make_data(64, 64, without=part)}", "batch_size=2")
    with pytest.raises(InputError, match=rf"task '{task}': the split 'train' has no .*tasks=\[{other}\]") as refused:
        way(config, tmp_path)
    assert "\n" not in str(refused.value)
    assert not Path(config.run_dir).exists()


@pytest.mark.parametrize(("part", "task", "best"), [("depth", "segmentation", "miou"), ("label", "depth", "depth_abs")])
def test_with_the_remedy_it_trains_and_chooses_the_best_by_what_there_is(
    make_config: MakeConfig, make_data: Callable[..., Path], part: str, task: str, best: str
) -> None:
    config = make_config(f"data.root={make_data(without=part)}", "batch_size=2", f"tasks=[{task}]")
    assert config.checkpoint.best == best
    train(config)
    assert checkpoint.load(Path(config.run_dir) / "checkpoints" / "best.pt")["best"]["metric"] == best
    assert load_config(Path(config.run_dir) / "config.yaml").checkpoint.best == best


def test_the_best_of_both_tasks_is_that_of_segmentation_unless_said(make_config: MakeConfig) -> None:
    assert make_config().checkpoint.best == make_config("tasks=[depth,segmentation]").checkpoint.best == "miou"
    assert make_config("tasks=[depth]", "checkpoint.best=depth_rel").checkpoint.best == "depth_rel"


def test_a_split_that_cannot_judge_a_task_is_said(make_config: MakeConfig, make_data: Callable[..., Path]) -> None:
    config = make_config(f"data.root={make_data(without='label', split='val')}", "batch_size=2", "epochs=1")
    with pytest.warns(
        UserWarning, match="the split 'val' has no pixel with a label: the metrics of 'segmentation' are not"
    ):
        train(config)
    assert not (Path(config.run_dir) / "checkpoints" / "best.pt").exists()


@pytest.mark.parametrize(
    ("ranks", "words"), [(1, ["batch_size=1"]), (1, ["batch_size=4", "optim.accumulate=4"]), (2, ["batch_size=2"])]
)
def test_batch_norm_over_a_single_value_is_refused_before_training(
    make_config: MakeConfig, make_data: Callable[..., Path], ranks: int, words: list[str]
) -> None:
    config = make_config(f"data.root={make_data(16, 16)}", *words)
    if ranks == 1:
        _refused(config)
    else:
        on_two_ranks(_refused, config)
    assert not Path(config.run_dir).exists()


def _refused(config: Config) -> None:
    with pytest.raises(
        InputError, match=r"images of 16x16 are 1x1 within the network, and there is 1 sample in a batch"
    ):
        train(config)


@pytest.mark.parametrize("words", [["batch_size=2"], ["batch_size=4", "optim.accumulate=2"]])
def test_two_values_are_enough_for_batch_norm(
    make_config: MakeConfig, make_data: Callable[..., Path], words: list[str]
) -> None:
    config = make_config(f"data.root={make_data(16, 16)}", *words, "epochs=1")
    train(config)
    assert final_state(config.run_dir)["evaluated"] > 0


def test_over_all_ranks_two_values_are_enough(make_config: MakeConfig, make_data: Callable[..., Path]) -> None:
    config = make_config(f"data.root={make_data(16, 16)}", "batch_size=2", "sync_batchnorm=true", "epochs=1")
    on_two_ranks(train, config)
    assert final_state(config.run_dir)["evaluated"] > 0


@pytest.mark.parametrize("limit", ["1e10", "1e15", "1e300"])
def test_a_limit_may_be_as_long_as_one_likes(make_config: MakeConfig, tmp_path: Path, limit: str) -> None:
    """In a group that is made as under torchrun."""
    save_config(make_config(f"timeout_s={limit}"), tmp_path / "tiny.yaml")
    code = (
        "import sys, torch; from mtunet_dist import distributed; from mtunet_dist.config import load_config\n"
        "with distributed.process_group(torch.device('cpu'), load_config(sys.argv[1]).timeout_s):\n"
        "    assert distributed.all_gather_object(1) == [1] and distributed.is_on()"
    )
    port = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "tiny.yaml")],
        env={**os.environ, **port},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_an_evaluation_whose_folder_cannot_be_written_prints_its_figures_first(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config("epochs=1")
    train(config)

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(evaluate, "write_json", refuse)
    monkeypatch.setattr(sys, "argv", ["evaluate", config.run_dir])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        evaluate.main()
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert "miou" in said.out and "depth_abs" in said.out
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    assert "evaluation-val.json cannot be written: Read-only file system; the figures are those above" in said.err
