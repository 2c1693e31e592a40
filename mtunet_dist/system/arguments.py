"""The parts that all command lines share: the name of a command, and checks of paths and devices."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from mtunet_dist import __version__
from mtunet_dist.errors import InputError

DEVICES = ("auto", "cpu", "cuda")
# File name endings that are refused where a folder is to be written.
FILES = {".csv", ".h5", ".jpeg", ".jpg", ".json", ".mat", ".md", ".npy", ".npz", ".onnx", ".png", ".pt", ".pth"}
FILES |= {".safetensors", ".tar", ".tgz", ".tif", ".tiff", ".txt", ".webp", ".yaml", ".yml", ".zip"}


class Parser(argparse.ArgumentParser):
    """argparse's parser, with ``--version`` and error messages of one line."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.add_argument("--version", action="version", version=f"mtunet_dist {__version__}")

    def error(self, message: str) -> NoReturn:
        """Raise InputError."""
        needed = message.replace(", key=value", "")  # parse_intermixed_args always lists it as required
        raise InputError(f"{needed}; {self.prog} --help says more")


def parser(verb: str, description: str, **settings: Any) -> Parser:
    """The parser of ``mtunet VERB``. It uses that name, whatever way the command was started."""
    return Parser(prog=f"mtunet {verb}", description=description, **settings)


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add ``path``, a run folder or a checkpoint, to a command line."""
    parser.add_argument(
        "path",
        type=path,
        metavar="RUN_OR_CHECKPOINT",
        help="a checkpoint, or a run folder: its best.pt, else its newest",
    )


def home(text: str) -> str:
    """Replace a leading ``~`` by the home folder. No shell does this in ``--out=~/x``."""
    try:
        return str(Path(text).expanduser()) if text.startswith("~") else text
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text}: there is no such home folder") from None


def path(text: str) -> Path:
    """The type of an argument that is a path."""
    return Path(home(text))


def folder(text: str) -> Path:
    """The type of an argument that is a folder to write. A name with a file's ending is refused."""
    suffix = Path(text).suffix.lower()
    if suffix in FILES and not path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is to be a folder, and {suffix} is the end of a file's name")
    return path(text)


def file(suffix: str) -> Callable[[str], Path]:
    """The type of an argument that is a file to write, in the only format that ``suffix`` allows."""

    def checked(text: str) -> Path:
        if Path(text).suffix != suffix:
            raise argparse.ArgumentTypeError(f"{text} must end with {suffix}, the one format there is")
        return path(text)

    return checked


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``, which is short for ``device=``."""
    parser.add_argument("--device", choices=DEVICES, help="short for device=; auto: a GPU where there is one")


def overrides(args: argparse.Namespace) -> list[str]:
    """The ``key=value`` words of a command line, with the option of ``add_device`` added."""
    return [*args.overrides, *([f"device={args.device}"] if args.device else [])]
