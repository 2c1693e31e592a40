"""A dataset without targets for a task: said when it is prepared, and refused when it is to be trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from helpers.format_2 import write_format_2
from mtunet_dist.data.prepared import PreparedDataset
from mtunet_dist.data.targets import check_targets, target_pixels
from mtunet_dist.errors import InputError
from mtunet_dist.prepare import prepare

SIZE = {"height": 16, "width": 32, "workers": 0}


@pytest.fixture
def source(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared.parent / "source", tmp_path / "source"))


@pytest.mark.parametrize(("part", "task"), [("depth", "depth"), ("label", "segmentation")])
@pytest.mark.parametrize("stored", ["shards", "source"])
def test_a_task_without_a_target_is_named(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str, task: str, stored: str
) -> None:
    other = "segmentation" if task == "depth" else "depth"
    shutil.rmtree(source / "train" / part)
    for again in range(2):  # a complete dataset says it too
        made = prepare("folder", source, tmp_path / "out", **SIZE, stored=stored)
        line = f"warning: the split 'train' has no pixel with a {part}; train without it: tasks=[{other}]\n"
        assert capsys.readouterr().out.count(line) == 1, again
    assert target_pixels(made.info, ["train"])[task] == 0
    assert target_pixels(made.info, ["val"])[task] > 0
    for tasks in (["segmentation", "depth"], [task]):
        missing = rf"task '{task}': the split 'train' has no pixel with a {part}.*tasks=\[{other}\]"
        with pytest.raises(InputError, match=missing):
            check_targets(made.info, "train", tasks)
    check_targets(made.info, "train", [other])
    check_targets(made.info, "train+val", ["segmentation", "depth"])


def test_a_dataset_without_any_target_teaches_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("label", "depth"):
        shutil.rmtree(source / "train" / part)
    made = prepare("folder", source, tmp_path / "out", **SIZE, options={"allow_unlabelled": True})
    assert "the split 'train' has no pixel with a depth; nothing can be learned from it" in capsys.readouterr().out
    with pytest.raises(InputError, match="nothing can be learned"):
        check_targets(made.info, "train", ["depth"])


def test_a_dataset_with_both_says_nothing(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare("folder", source, tmp_path / "out", **SIZE)
    assert "warning" not in capsys.readouterr().out


def test_a_dataset_from_before_samples_were_counted_is_judged_by_its_pixels(prepared: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(prepared, tmp_path / "copy"))
    write_format_2(copy)
    value = json.loads((copy / "dataset.json").read_text())
    for split in value["splits"].values():
        del split["samples_without_label"], split["samples_without_depth"]
    value["splits"]["train"]["valid_depth_pixels"] = 0
    (copy / "dataset.json").write_text(json.dumps(value))
    info = PreparedDataset(copy).info
    check_targets(info, "train", ["segmentation"])
    with pytest.raises(InputError, match="task 'depth'"):
        check_targets(info, "train", ["segmentation", "depth"])
