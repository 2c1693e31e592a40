"""Folders that can be moved: the settings in such a folder mean the folder where they are now, wherever it was
before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

CONFIG = "config.yaml"  # in a run folder
SIGNS = ("environment.json", "lock", "checkpoints/step_*.pt", "checkpoints/best.pt")  # any of them marks a run folder
SWEEP, BEST = "sweep.yaml", "best.yaml"  # in a sweep's folder: its description, and the config of its best trial
SWEEP_SIGNS = ("lock", "trials/*/trial.json")


def own_folder(file: Path, name: str = CONFIG, signs: Sequence[str] = SIGNS) -> Path | None:
    """The folder whose settings ``file`` holds: the file there is called ``name`` and lies beside one of ``signs``
    (globs).

    None if the file is not part of such a folder. A link to such a file means the folder of the file itself.
    """
    for place in (file, file.resolve()):
        if place.name == name and any(any(place.parent.glob(sign)) for sign in signs):
            return place.parent
    return None


def own_run_dir(config: Path) -> Path | None:
    """The run folder that a config means by its place: the folder of a run's own config, or ``best`` beside a sweep's
    best.yaml.

    None if the place of the config means no folder; the config then names its run folder.
    """
    sweep = own_folder(config, BEST, SWEEP_SIGNS)
    return own_folder(config) if sweep is None else sweep / Path(BEST).stem


def shown(folder: Path) -> str:
    """The path as text for an error message. A relative path is shown with the working folder."""
    return str(folder) if folder.is_absolute() else f"{folder} (in the working folder {Path.cwd()})"
