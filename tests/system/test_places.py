"""Where a command may write: not where a later run would take the results for input."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mtunet_dist import predict, synthesize
from mtunet_dist.errors import InputError
from mtunet_dist.prepare import prepare
from mtunet_dist.sources.nyuv2_mat import FILE

SIZE = {"height": 16, "width": 32, "workers": 0}


@pytest.fixture
def source(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared.parent / "source", tmp_path / "source"))


@pytest.mark.parametrize("name", ["out", "deep/er/out", ".", ".hidden", "train"])
@pytest.mark.parametrize("linked", ["", "root", "out"])
@pytest.mark.parametrize("kind", ["folder", "cityscapes", "nyuv2", "mtan", "nyuv2_mat"])
def test_out_in_root_is_refused(source: Path, tmp_path: Path, kind: str, name: str, linked: str) -> None:
    link = tmp_path / "link"
    link.symlink_to(source)
    root, out = (link if linked == "root" else source), (link if linked == "out" else source) / name
    before = sorted(source.rglob("*"))
    with pytest.raises(InputError, match=r"OUT .* lies in ROOT .* choose a folder outside"):
        prepare(kind, root, out, **SIZE)
    assert sorted(source.rglob("*")) == before


def test_out_may_lie_beside_root_and_have_its_name_as_a_beginning(source: Path, tmp_path: Path) -> None:
    assert prepare("folder", source, tmp_path / "source-out", **SIZE).info.splits["train"].count == 12


@pytest.mark.parametrize("deep", ["", "deep"])
def test_root_in_out_is_refused(source: Path, tmp_path: Path, deep: str) -> None:
    root = Path(shutil.move(source, tmp_path / "all" / deep / "source")) if deep else source
    (tmp_path / FILE).touch()
    for kind, given in (("folder", root), ("nyuv2_mat", tmp_path / FILE)):
        with pytest.raises(InputError, match=r"ROOT .* lies in OUT .* choose another folder for OUT"):
            prepare(kind, given, tmp_path, **SIZE)


def _prepare(source: Path, out: Path, photos: Path) -> None:
    other = source.with_name("other")
    shutil.copytree(source, other)
    prepare("folder", other, out, **SIZE)


def _synthesize(source: Path, out: Path, photos: Path) -> None:
    synthesize.synthesize(out, synthesize.Settings(train=1, val=0, test=0, height=32, width=32))


def _predict(source: Path, out: Path, photos: Path) -> None:
    predict.check_out(out, predict.find_images([photos]))


@pytest.mark.parametrize("write", [_prepare, _synthesize, _predict])
@pytest.mark.parametrize("inside", [True, False])
def test_no_command_writes_into_another_dataset(
    source: Path, tmp_path: Path, write: Callable[[Path, Path, Path], None], inside: bool
) -> None:
    """A folder in the folder of a source would be one of its splits."""
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8)).save(photos / "a.png")
    before = sorted(source.rglob("*"))
    if inside:
        with pytest.raises(InputError, match=r"out lies in the dataset .*source \(it has a dataset\.yaml\)"):
            write(source, source / "out", photos)
    else:
        write(source, tmp_path / "out", photos)
    assert sorted(source.rglob("*")) == before


@pytest.mark.parametrize("images", [["photos"], ["photos/a.png"], ["other/b.png", "photos"], ["link"], ["link.png"]])
@pytest.mark.parametrize("out", ["photos", "link", "photos/../photos"])
def test_predict_writes_no_results_among_its_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], images: list[str], out: str
) -> None:
    for file in ("photos/a.png", "other/b.png"):
        (tmp_path / file).parent.mkdir()
        Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8)).save(tmp_path / file)
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    (tmp_path / "link.png").symlink_to(tmp_path / "photos" / "a.png")
    monkeypatch.setattr(
        sys, "argv", ["predict", "no/run", *(str(tmp_path / x) for x in images), "--out", str(tmp_path / out)]
    )
    with pytest.raises(SystemExit):
        predict.main()
    assert "lies there, and results would be taken for images; choose another" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "photos").iterdir()) == ["a.png"]
    predict.check_out(tmp_path / "photos" / "results", predict.find_images([tmp_path / "photos"]))
