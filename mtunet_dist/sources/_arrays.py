"""Arrays of numbers in npy files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from mtunet_dist.errors import InputError


def map_numbers(path: Path) -> np.ndarray:
    """The array in an npy file. Only its header is read at once. Raises InputError as ``load_numbers``."""
    return _numbers(path, lambda: np.lib.format.open_memmap(path, mode="r"))


def load_numbers(path: Path) -> np.ndarray:
    """The array in an npy file, read whole: if a mapped file is cut short, SIGBUS ends the process without a message.

    Raises InputError that names the file if it is not a complete npy file of numbers.
    """
    return _numbers(path, lambda: np.load(path, allow_pickle=False))


def _numbers(path: Path, read: Callable[[], np.ndarray]) -> np.ndarray:
    try:
        array = read()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: not a complete npy file of numbers: {error}") from None
    if array.dtype.kind not in "iuf":
        raise InputError(f"{path}: holds {array.dtype}; expected numbers")
    return array
