"""Weights for other programs: ``python -m mtunet_dist.export RUN_OR_CHECKPOINT --out FILE.safetensors``.

The safetensors file holds the network's ``state_dict``: contiguous parameters and batch-norm statistics in float32. Its
metadata are text and say how to use them: ``config`` (YAML), ``dataset`` (JSON: classes, depth), ``image_mean`` and
``image_std`` (JSON: subtract from RGB 0..255, then divide), ``step``.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from mtunet_dist.core.step import IMAGE_MEAN, IMAGE_STD
from mtunet_dist.errors import InputError
from mtunet_dist.runs import checkpoint
from mtunet_dist.runs.loading import load_run
from mtunet_dist.system import arguments
from mtunet_dist.system.command import command


def export(state: checkpoint.State, out: Path) -> int:
    """Write the weights in the ``state`` of a checkpoint to ``out``. Returns how many numbers. InputError if it
    cannot."""
    prefix = "model."
    saved = state["strategy"]["model"].items()
    weights = {name.removeprefix(prefix): value.contiguous() for name, value in saved if name.startswith(prefix)}
    metadata = {
        "format": "pt",
        "step": str(state["step"]),
        "config": state["config"],
        "dataset": state["dataset"],
        "image_mean": json.dumps([255 * value for value in IMAGE_MEAN]),
        "image_std": json.dumps([255 * value for value in IMAGE_STD]),
    }
    temporary = out.with_name(out.name + ".tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_file(weights, temporary, metadata)
        temporary.replace(out)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise InputError(f"--out={out} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    return sum(value.numel() for value in weights.values())


@command
def main() -> None:
    """The command line."""
    parser = arguments.parser("export", __doc__.splitlines()[0])
    arguments.add_run(parser)
    parser.add_argument(
        "--out",
        type=arguments.file(".safetensors"),
        required=True,
        metavar="FILE",
        help="where to write, FILE.safetensors",
    )
    args = parser.parse_args()
    state, _, file = load_run(args.path, [])
    numbers = export(state, args.out)
    print(f"{numbers / 1e6:.2f} M numbers of {file} (step {state['step']}) written to {args.out}")


if __name__ == "__main__":
    main()
