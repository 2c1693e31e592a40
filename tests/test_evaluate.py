"""Evaluation: the same figures for any number of ranks, the table, the constant predictor; and prediction."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from helpers.training import on_ranks
from mtunet_dist import distributed, plugins
from mtunet_dist import evaluate as evaluation
from mtunet_dist import export as exporting
from mtunet_dist import predict as prediction
from mtunet_dist.config import Config, config_from_text
from mtunet_dist.config.typed_yaml import to_yaml
from mtunet_dist.core.step import build_step
from mtunet_dist.data.prepared import PreparedDataset
from mtunet_dist.errors import InputError
from mtunet_dist.runs import checkpoint
from mtunet_dist.runs.baselines import ConstantPredictor
from mtunet_dist.runs.evaluation import Evaluation, eval_loader, evaluate, metric_names
from mtunet_dist.runs.loading import load_step
from mtunet_dist.train import train

MakeConfig = Callable[..., Config]
CPU = torch.device("cpu")


def evaluated(config: Config) -> Evaluation:
    """Metrics of an untrained network, the same in every process."""
    dataset = PreparedDataset(Path(config.data.root))
    torch.manual_seed(0)
    step = build_step(config, dataset.info.tasks(config.tasks)).eval()
    return evaluate(step, eval_loader(config, dataset.split("train+val"), CPU), CPU)


@pytest.mark.parametrize("batch", [4, 10])  # of 17 samples: 5 batches, 2, 2 and 1 for the ranks; or 1, 1 and none
def test_three_ranks_with_uneven_shards_agree_with_one(make_config: MakeConfig, tmp_path: Path, batch: int) -> None:
    config = make_config(f"eval_batch_size={batch}")
    on_ranks(3, _evaluate_and_write, config, tmp_path)
    alone = evaluated(config)
    assert alone.samples == 17
    for rank in range(3):
        together = json.loads((tmp_path / f"{rank}.json").read_text())
        assert together["samples"] == 17
        assert together["metrics"] == pytest.approx(alone.metrics, rel=1e-12)
        assert together["class_iou"] == pytest.approx(alone.class_iou, rel=1e-12)


def _evaluate_and_write(config: Config, folder: Path) -> None:
    (folder / f"{distributed.rank()}.json").write_text(json.dumps(evaluated(config).as_dict()))


def test_metrics_hold_both_families(make_config: MakeConfig) -> None:
    metrics = evaluated(make_config()).metrics
    whole = {"miou", "accuracy", "depth_abs", "depth_rel", "depth_rmse", "depth_delta1"}
    legacy = {"legacy/miou", "legacy/accuracy", "legacy/depth_abs", "legacy/depth_rel"}
    assert whole | legacy | {"loss/segmentation", "loss/depth"} == metrics.keys()


def test_metric_names_are_those_that_evaluate_gives(make_config: MakeConfig, dataset: PreparedDataset) -> None:
    tasks = dataset.info.tasks(["segmentation", "depth"])
    assert set(metric_names(tasks)) == evaluated(make_config()).metrics.keys()


def test_an_empty_split_is_refused_by_name(make_config: MakeConfig, dataset: PreparedDataset) -> None:
    split = dataset.split("val")
    split.keys.clear()
    with pytest.raises(InputError, match=f"{dataset.root}: the split 'val' has no samples"):
        eval_loader(make_config(), split, CPU)


def test_constant_predictor_has_the_figures_that_counting_gives(
    dataset: PreparedDataset, make_config: MakeConfig
) -> None:
    train_split, val = dataset.split("train"), dataset.split("val")
    labels = np.concatenate([train_split.decode(i).targets["segmentation"].ravel() for i in range(12)])
    depths = np.concatenate([train_split.decode(i).targets["depth"].ravel() for i in range(12)])
    most_frequent = np.bincount(labels[labels != 255]).argmax()
    median = np.median(depths[depths > 0]) * 0.001
    tasks = dataset.info.tasks(["segmentation", "depth"])
    result = evaluate(ConstantPredictor(tasks, train_split), eval_loader(make_config(), val, CPU), CPU)

    label = np.concatenate([val.decode(i).targets["segmentation"].ravel() for i in range(5)])
    depth = np.concatenate([val.decode(i).targets["depth"].ravel() for i in range(5)]) * 0.001
    share = (label[label != 255] == most_frequent).mean()
    assert result.metrics["accuracy"] == pytest.approx(share)
    assert result.metrics["miou"] == pytest.approx(share / 3)
    assert result.metrics["depth_abs"] == pytest.approx(np.abs(depth[depth > 0] - median).mean(), rel=1e-3)


def test_a_class_that_never_occurs_is_null_in_json() -> None:
    text = json.dumps(Evaluation(1, {"miou": 0.5}, {"box": math.nan}).as_dict(), allow_nan=False)
    assert json.loads(text)["class_iou"] == {"box": None}


def test_evaluate_command_on_a_run_and_on_a_file(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config("epochs=1")
    metrics = train(config)
    (tmp_path / "[").mkdir()
    run_dir = Path(config.run_dir).rename(tmp_path / "[" / "b] #1 ${x}")  # [/b] is markup to rich
    for path in (run_dir, run_dir / "checkpoints" / "best.pt"):
        (run_dir / "evaluation-val.json").unlink(missing_ok=True)
        monkeypatch.setattr(sys, "argv", ["evaluate", str(path), "--split", "val"])
        evaluation.main()
        assert "IoU box" in capsys.readouterr().out
        written = json.loads((run_dir / "evaluation-val.json").read_text())
        assert written["trained"]["metrics"] == pytest.approx(metrics)
        assert written["constant"]["samples"] == 5


def test_evaluate_without_the_training_split_has_no_constant_to_compare_with(
    make_config: MakeConfig, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("epochs=1")
    train(config)
    elsewhere = tmp_path / "only_val"
    shutil.copytree(prepared, elsewhere)
    info = json.loads((elsewhere / "dataset.json").read_text())
    del info["splits"]["train"]
    (elsewhere / "dataset.json").write_text(json.dumps(info))
    monkeypatch.setattr(sys, "argv", ["evaluate", config.run_dir, f"data.root={elsewhere}"])
    evaluation.main()
    written = json.loads((Path(config.run_dir) / "evaluation-val.json").read_text())
    assert written["trained"]["samples"] == 5
    assert "constant" not in written


def test_predict_writes_label_depth_and_preview_at_the_images_own_size(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = make_config("epochs=1")
    train(config)
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.fromarray(np.full((70, 90, 3), 127, dtype=np.uint8)).save(photos / "a.png")
    Image.fromarray(np.full((40, 60, 3), 40, dtype=np.uint8)).save(photos / "b.jpg")
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["predict", config.run_dir, str(photos), "--out", str(out)])
    prediction.main()
    label, depth = Image.open(out / "a.label.png"), Image.open(out / "a.depth.png")
    assert label.size == depth.size == (90, 70)
    assert set(np.unique(np.asarray(label))) <= {0, 1, 2}
    assert np.asarray(depth).min() >= 1
    assert {p.name for p in out.iterdir()} == {f"{s}.{k}.png" for s in "ab" for k in ("label", "depth", "preview")}


def test_predict_on_a_cpu_what_was_trained_on_a_gpu(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = make_config("epochs=1")
    train(config)
    file = checkpoint.resolve(Path(config.run_dir))
    state = checkpoint.load(file)
    torch.save({**state, "config": to_yaml(dataclasses.replace(config, device="cuda"))}, tmp_path / "cuda.pt")
    Image.fromarray(np.full((40, 60, 3), 40, dtype=np.uint8)).save(tmp_path / "a.png")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    words = ["predict", str(tmp_path / "cuda.pt"), str(tmp_path / "a.png"), "--out", str(tmp_path / "out")]
    for device in ([], ["--device", "cpu"]):
        monkeypatch.setattr(sys, "argv", [*words, *device])
        prediction.main()
        (tmp_path / "out" / "a.label.png").unlink()
    monkeypatch.setattr(sys, "argv", [*words, "--device", "cuda"])
    with pytest.raises(SystemExit):
        prediction.main()
    assert not (tmp_path / "out" / "a.label.png").exists()


def test_exported_weights_and_their_metadata_are_enough_to_predict(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config("epochs=1")
    train(config)
    out = tmp_path / "out" / "weights.safetensors"
    monkeypatch.setattr(sys, "argv", ["export", config.run_dir, "--out", str(out)])
    exporting.main()
    assert f"(step 3) written to {out}" in capsys.readouterr().out
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    outputs = {"segmentation": len(json.loads(metadata["dataset"])["targets"]["segmentation"]["classes"]), "depth": 1}
    model = plugins.build("model", config_from_text(metadata["config"]).model, outputs).eval()
    model.load_state_dict(weights)
    image = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    mean, std = (torch.tensor(json.loads(metadata[key])).view(3, 1, 1) for key in ("image_mean", "image_std"))
    state = checkpoint.load(checkpoint.resolve(Path(config.run_dir)))
    with torch.no_grad():
        torch.testing.assert_close(model((image - mean) / std), load_step(state, config, CPU).predict(image))
    with pytest.raises(InputError, match=r"^--out=.* cannot be written: "):
        exporting.export(state, out / "below_a_file")
