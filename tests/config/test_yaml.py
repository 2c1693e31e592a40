"""YAML that a user writes: numbers mean the same in every file, and no key wins over another in silence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from mtunet_dist.config import load_config
from mtunet_dist.config.typed_yaml import load_as
from mtunet_dist.errors import InputError
from mtunet_dist.sources.folder import Folder
from mtunet_dist.system.files import read_yaml

NUMBERS = {
    "1e-3": 1e-3,
    "1E-3": 1e-3,
    "1.e-3": 1e-3,
    ".5e-2": 5e-3,
    "+2e+1": 20.0,
    "1.5e3": 1500.0,
    "0.25": 0.25,
    "4": 4,
}


@dataclass(frozen=True)
class _Profile:
    """As the files that ``load_as`` reads: a sweep's, a cluster's profile."""

    number: float = 0.0


@pytest.mark.parametrize(("text", "value"), NUMBERS.items())
def test_a_number_is_a_number_in_every_file(tmp_path: Path, text: str, value: float) -> None:
    file = tmp_path / "dataset.yaml"
    file.write_text(f"classes: [a]\ndepth_scale: {text}\n")
    assert Folder(tmp_path).targets["depth"].scale == value
    file.write_text(f"number: {text}\n")
    assert load_as(_Profile, file).number == value
    file.write_text(f"run_dir: x\ndata: {{root: y}}\noptim: {{lr: {text}}}\n")
    assert load_config(file).optim.lr == value


@pytest.mark.parametrize("text", ["1e", "e3", "1e-", "1e3x", "v1e3", "2e3.5"])
def test_text_stays_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(f"a: {text}\n")
    assert read_yaml(tmp_path / "x.yaml") == {"a": text}


@pytest.mark.parametrize("scale", [".inf", ".nan", "1e400", "-1e-3", "'1e-3'"])
def test_a_depth_scale_that_is_no_positive_number_is_refused(tmp_path: Path, scale: str) -> None:
    (tmp_path / "dataset.yaml").write_text(f"classes: [a]\ndepth_scale: {scale}\n")
    with pytest.raises(InputError, match=r"dataset\.yaml: depth_scale is .*; expected a number above 0"):
        Folder(tmp_path)


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dataset.yaml").write_text("classes: [a]\nvoid_ids: [0]\nclasses: [a, b]\n")
    with pytest.raises(InputError, match=r"dataset\.yaml: not YAML: the key 'classes' is there twice .*line 1"):
        Folder(tmp_path)


def test_a_class_name_that_yaml_takes_for_a_truth_value_says_how_to_write_it(tmp_path: Path) -> None:
    (tmp_path / "dataset.yaml").write_text("classes: [on, off]\n")
    with pytest.raises(InputError, match=r"class 0 is True; expected a name \(in quotes"):
        Folder(tmp_path)


def test_a_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "dataset.yaml").write_bytes("classes: [Straße]\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"dataset\.yaml: not YAML"):
        Folder(tmp_path)
