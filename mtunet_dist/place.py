"""Folders that work wherever they lie: the settings inside mean the folder that they are in, not where it once was."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

CONFIG = "config.yaml"  # of a run folder
SIGNS = ("environment.json", "lock", "checkpoints/step_*.pt", "checkpoints/best.pt")  # any of them makes it one


def own_folder(file: Path, name: str = CONFIG, signs: Sequence[str] = SIGNS) -> Path | None:
    """The folder whose own settings ``file`` holds: it is called ``name`` there, beside one of ``signs`` (globs).

    None for a file that only names a folder. A link to such a file means the folder of the file itself.
    """
    for place in (file, file.resolve()):
        if place.name == name and any(any(place.parent.glob(sign)) for sign in signs):
            return place.parent
    return None


def shown(folder: Path) -> str:
    """A path for an error message: one that is relative with the folder that it starts from."""
    return str(folder) if folder.is_absolute() else f"{folder} (in the working folder {Path.cwd()})"
