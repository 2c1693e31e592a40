"""Classes: which names and numbers of them are refused, and that every place shows a name as it is."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from rich.console import Console

from mtunet_dist import evaluate, plugins, summary
from mtunet_dist.data import report
from mtunet_dist.data.prepared import PreparedDataset
from mtunet_dist.errors import InputError
from mtunet_dist.prepare import prepare
from mtunet_dist.runs.evaluation import Evaluation
from mtunet_dist.sources import nyuv2
from mtunet_dist.sources._nyuv2 import CLASSES_40
from mtunet_dist.sources.cityscapes import class_set
from mtunet_dist.sources.folder import Folder
from mtunet_dist.sources.nyuv2 import CLASSES, NYUv2
from mtunet_dist.tasks.segmentation import MOST_CLASSES, VOID, ClassInfo, Segmentation, class_problem

ODD = ["[void]", ":car:", "[/red]", "back\\", "$\\oops$", "Straße", "a|b", "{x}"]
BAD = [
    (["car", "road", "car"], "'car' and 'car' must differ"),
    (["car", "Car"], "'car' and 'Car' must differ"),
    (["traffic light", "trafficlight"], "must differ in more than blanks and case"),
    (["car", ""], "the class name ''"),
    (["car", "  "], "the class name '  '"),
    (["car ", "road"], "the class name 'car '"),
    (["car\nroad"], "the class name 'car\\nroad'"),
    (["a\tb"], "the class name 'a\\tb'"),
    ([f"c{i}" for i in range(256)], "256 classes; a dataset has 1 to 255"),
]


def infos(names: list[str]) -> tuple[ClassInfo, ...]:
    return tuple(ClassInfo(name, (1, 2, 3)) for name in names)


def other_classes(classes: tuple[ClassInfo, ...]) -> type[NYUv2]:
    """A source like NYUv2 with these classes."""

    class Other(NYUv2):
        __doc__ = NYUv2.__doc__

        def __init__(self, root: Path, *, val: bool = True) -> None:
            super().__init__(root, val=val)
            self.targets["segmentation"] = Segmentation("segmentation", classes)

    return Other


def make_source(root: Path, description: object, label: np.ndarray) -> Path:
    """A folder source with a sample in train and one in val."""
    for split in ("train", "val"):
        for part, pixels in {
            "rgb": np.zeros((*label.shape, 3), dtype=np.uint8),
            "label": label,
            "depth": np.full(label.shape, 7, dtype=np.uint16),
        }.items():
            (root / split / part).mkdir(parents=True)
            Image.fromarray(pixels).save(root / split / part / "x.png")
    (root / "dataset.yaml").write_text(yaml.safe_dump(description, allow_unicode=True), encoding="utf-8")
    return root


@pytest.mark.parametrize(("names", "words"), BAD, ids=range(len(BAD)))
def test_bad_classes_are_refused_for_every_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], words: str
) -> None:
    root = tmp_path / "source"
    root.mkdir()
    (root / "dataset.yaml").write_text(yaml.safe_dump({"classes": names}), encoding="utf-8")
    with pytest.raises(InputError, match=r"dataset\.yaml: ") as error:
        Folder(root)
    assert words in str(error.value)
    monkeypatch.setattr(nyuv2, "PLUGIN", other_classes(infos(names)))  # it comes with classes of its own
    with pytest.raises(InputError, match="source 'nyuv2' at ") as error:
        prepare("nyuv2", root, tmp_path / "out", workers=0)
    assert words in str(error.value) and not (tmp_path / "out").exists()


def test_the_classes_of_our_sources_are_good() -> None:
    assert plugins.available("source") == ["cityscapes", "folder", "mtan", "nyuv2", "nyuv2_mat"]
    for classes in (CLASSES, CLASSES_40, *(tuple(class_set(n)) for n in (2, 7, 19))):
        assert class_problem(classes) is None
    assert class_problem(infos(ODD)) is None


@pytest.mark.parametrize("names", [["a", "b", "a"], [f"c{i}" for i in range(256)]])
def test_a_dataset_that_was_prepared_with_such_classes_is_refused(
    prepared: Path, tmp_path: Path, names: list[str]
) -> None:
    copy = Path(shutil.copytree(prepared, tmp_path / "copy"))
    value = json.loads((copy / "dataset.json").read_text())
    value["targets"]["segmentation"]["classes"] = [{"name": name, "color": [1, 2, 3]} for name in names]
    (copy / "dataset.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match=r"dataset\.json: .*class.*prepare it again"):
        PreparedDataset(copy)


def test_255_classes_are_kept_apart_from_void(tmp_path: Path) -> None:
    names = [f"c{i}" for i in range(MOST_CLASSES)]
    label = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for offset, void in ((0, 255), (1, 0)):
        root = make_source(
            tmp_path / f"s{offset}", {"classes": names, "label_offset": offset, "void_ids": [void]}, label
        )
        made = prepare("folder", root, tmp_path / f"out{offset}", height=16, width=16, workers=0)
        stored = made.split("train").decode(0).targets["segmentation"]
        assert stored.ravel().tolist() == [VOID if value == void else value - offset for value in range(256)]
        counts = made.info.splits["train"].targets["segmentation"]
        assert (counts["classes"], counts["pixels"] - counts["valid"]) == ([1] * 255, 1)


@pytest.mark.parametrize(
    ("description", "words"),
    [
        ({"classes": 13, "void_ids": [0]}, "0 in void_ids is the label value of a class too; if the first class has "),
        ({"classes": 13, "void_ids": [0, 255]}, "label value 1, add label_offset: 1; else take 0 out of void_ids"),
        ({"classes": 13, "void_ids": [0, 1]}, "label value 2, add label_offset: 2; else take 0 out of void_ids"),
        ({"classes": 13, "void_ids": [5]}, "5 in void_ids is the label value of a class too; take 5 out of void_ids"),
        ({"classes": 13, "label_offset": 1, "void_ids": [13]}, "13 in void_ids is the label value of a class too"),
        ({"classes": 255, "label_offset": 1}, "255 in void_ids is the label value of a class too; take 255 out"),
        ({"classes": 255, "label_offset": 2, "void_ids": []}, "label_offset 2 puts 255 classes outside 0..255"),
    ],
)
def test_a_label_value_has_one_meaning(tmp_path: Path, description: dict[str, object], words: str) -> None:
    classes = [f"c{i}" for i in range(int(str(description["classes"])))]
    (tmp_path / "dataset.yaml").write_text(yaml.safe_dump({**description, "classes": classes}))
    with pytest.raises(InputError, match=r"dataset\.yaml: ") as error:
        Folder(tmp_path)
    assert words in str(error.value)


def test_a_label_value_without_meaning_says_where_meanings_are_given(tmp_path: Path) -> None:
    root = make_source(tmp_path / "s", {"classes": ["a", "b"], "label_offset": 1}, np.zeros((4, 4), dtype=np.uint8))
    with pytest.raises(
        InputError, match=r"label value 0 is not one of 1\.\.2, 255; see .* void_ids in .*dataset\.yaml"
    ):
        prepare("folder", root, tmp_path / "out", height=4, width=4, workers=0)


def _dataset_table(dataset: PreparedDataset) -> object:
    return report.table(dataset)


def _evaluation_table(dataset: PreparedDataset) -> object:
    names = [c.name for c in dataset.info.targets["segmentation"].classes]
    return evaluate.table(f"{dataset.root}", {"trained": Evaluation(1, {"miou": 0.5}, dict.fromkeys(names, 0.25))})


@pytest.mark.parametrize("made", [_dataset_table, _evaluation_table])
def test_tables_show_names_and_paths_as_they_are(tmp_path: Path, made: Callable[[PreparedDataset], object]) -> None:
    root = make_source(tmp_path / "s", {"classes": ODD}, np.zeros((4, 4), dtype=np.uint8))
    out = tmp_path / "[bold]out:car:[/x]"
    dataset = prepare("folder", root, out, height=4, width=4, workers=0)
    file = io.StringIO()
    Console(file=file, width=400, force_terminal=False).print(made(dataset))
    for text in (*ODD, out.name):
        assert text in file.getvalue()


def test_the_summary_draws_names_and_paths_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """matplotlib takes what stands between dollars for mathematics, and some of it for an error."""
    root = make_source(tmp_path / "s", {"classes": ODD}, np.zeros((32, 32), dtype=np.uint8))
    out = tmp_path / "$\\x$ [bold]"
    prepare("folder", root, out, height=32, width=32, workers=0)
    monkeypatch.setattr(sys, "argv", ["summary", str(out)])
    summary.main()
    assert "[void]" in capsys.readouterr().out and Image.open(out / "summary.png").width > 1000


def test_preparing_again_in_a_folder_with_an_odd_name_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_source(tmp_path / "s", {"classes": ["a"]}, np.zeros((4, 4), dtype=np.uint8))
    out = tmp_path / "[/x]out"
    for _ in range(2):
        prepare("folder", root, out, height=4, width=4, workers=0)
    assert f"{out} is complete" in capsys.readouterr().out
