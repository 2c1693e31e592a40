"""Folders that work wherever they lie: the settings inside mean the folder that they are in, not where it once was."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

CONFIG = "config.yaml"  # of a run folder
SIGNS = ("environment.json", "lock", "checkpoints/step_*.pt", "checkpoints/best.pt")  # any of them makes it one
SWEEP, BEST = "sweep.yaml", "best.yaml"  # of the folder of a sweep: what it is, and its best trial's config
SWEEP_SIGNS = ("lock", "trials/*/trial.json")


def own_folder(file: Path, name: str = CONFIG, signs: Sequence[str] = SIGNS) -> Path | None:
    """The folder whose own settings ``file`` holds: it is called ``name`` there, beside one of ``signs`` (globs).

    None for a file that only names a folder. A link to such a file means the folder of the file itself.
    """
    for place in (file, file.resolve()):
        if place.name == name and any(any(place.parent.glob(sign)) for sign in signs):
            return place.parent
    return None


def own_run_dir(config: Path) -> Path | None:
    """The run folder that a config means by where it lies: a run folder's own, or ``best`` beside a sweep's best.yaml.

    None for a config that names its run folder.
    """
    sweep = own_folder(config, BEST, SWEEP_SIGNS)
    return own_folder(config) if sweep is None else sweep / Path(BEST).stem


def shown(folder: Path) -> str:
    """A path for an error message: one that is relative with the folder that it starts from."""
    return str(folder) if folder.is_absolute() else f"{folder} (in the working folder {Path.cwd()})"
