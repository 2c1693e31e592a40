"""Plugin files that lack something: one line that names the file and what is missing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtunet_dist import plugins
from mtunet_dist.config import load_config, plugin_options
from mtunet_dist.errors import InputError

HEAD = "from __future__ import annotations\nclass Odd:\n    def __init__(self, inputs, *, "


@pytest.fixture(params=sorted(plugins.PACKAGES.keys() - {"task"}))  # tasks have no options, see test_tasks.py
def kind(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A kind of plugin, whose folder has ``tmp_path / "odd.py"`` too."""
    package = f"mtunet_dist.{plugins.PACKAGES[request.param]}"
    __import__(package)
    monkeypatch.setattr(sys.modules[package], "__path__", [*sys.modules[package].__path__, str(tmp_path)])
    yield request.param
    sys.modules.pop(f"{package}.odd", None)


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("class Odd: ...\n", "must end with PLUGIN = TheClass"),
        ("PLUGIN = 3\n", "must end with PLUGIN = TheClass"),
        (f"{HEAD}size=1): ...\nPLUGIN = Odd\n", "the option size has no type"),
        (f"{HEAD}size: int): ...\nPLUGIN = Odd\n", "the option size has no default"),
        (f"{HEAD}size: Itn = 1): ...\nPLUGIN = Odd\n", "'Itn' is not defined"),
        (f"{HEAD}size: list[int] = []): ...\nPLUGIN = Odd\n", "the option size is list[int]; an option may be"),
        (f"{HEAD}size: bytes = b''): ...\nPLUGIN = Odd\n", "the option size is bytes; an option may be"),
        (f"{HEAD}size: int = 'a'): ...\nPLUGIN = Odd\n", "size=a must be a whole number"),
    ],
)
def test_a_plugin_that_lacks_something_is_named(kind: str, text: str, missing: str, tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as refused:
        plugin_options(kind, "odd", {})
    assert missing in str(refused.value)
    assert "odd.py" in str(refused.value) or "'odd'" in str(refused.value)
    assert "\n" not in str(refused.value)
    if kind != "source":
        with pytest.raises(InputError, match="odd"):
            load_config(None, ["run_dir=r", "data.root=d", f"{kind}.name=odd"])


def test_a_plugin_may_have_each_type_of_option(kind: str, tmp_path: Path) -> None:
    options = (
        "a: bool = True, b: int = 1, c: float = 0.5, d: str = 'x', e: tuple[int, ...] = (1,), f: str | None = None"
    )
    (tmp_path / "odd.py").write_text(f"{HEAD}{options}): ...\nPLUGIN = Odd\n", encoding="utf-8")
    values = {"a": True, "b": 1, "c": 0.5, "d": "x", "e": (1,), "f": None}
    assert plugin_options(kind, "odd", {}) == values
    assert plugin_options(kind, "odd", ["f=2024_11", "e=[2]"]) == {**values, "f": "2024_11", "e": (2,)}
