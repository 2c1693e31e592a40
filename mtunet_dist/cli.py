"""``mtunet VERB ...`` is short for ``python -m mtunet_dist.VERB ...``."""

from __future__ import annotations

import importlib
import sys

from mtunet_dist import __version__
from mtunet_dist.errors import InputError, closest, needs
from mtunet_dist.system import startup
from mtunet_dist.system.command import command

VERBS = {
    "synthesize": "write synthetic street scenes in the layout of Cityscapes",
    "prepare": "turn a published dataset, or your own, into a prepared one",
    "summary": "what is in a prepared dataset, in figures and as a picture",
    "train": "train, or resume a training, in one process or under torchrun",
    "launch": "train with all processes of this machine, or on many nodes",
    "evaluate": "metrics of a run or a checkpoint",
    "sweep": "search for good settings with Ray Tune",
    "submit": "submit a training, a sweep or a reproduction to Slurm",
    "status": "the runs under a folder and their progress",
    "reproduce": "the tables and figures of the paper",
    "predict": "label and depth of your own images",
    "export": "the weights as safetensors, for other programs",
}


def main() -> None:
    """Run the verb named first with the rest of the command line."""
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in VERBS:
        sys.argv = [f"mtunet {verb}", *sys.argv[2:]]
        run(verb)
    else:
        startup.begin()
        command(lambda: _about(verb))()


def run(verb: str) -> None:
    """Run a verb with the words of the command line. The scripts of the repository call this."""
    startup.begin()
    command(lambda: _import(verb))()
    importlib.import_module(f"mtunet_dist.{verb}").main()


def _import(verb: str) -> None:
    """Import the module of a verb. Raises InputError if it needs a package that is an extra."""
    try:
        importlib.import_module(f"mtunet_dist.{verb}")
    except ModuleNotFoundError as error:
        raise needs(f"mtunet {verb}", error) from None


def _about(verb: str) -> None:
    """Print ``--help`` or ``--version``, or report an unknown verb."""
    if verb in ("-h", "--help"):
        print("usage: mtunet VERB ...\n\n" + "\n".join(f"  {name:<12}{text}" for name, text in VERBS.items()))
        print("\nmtunet VERB --help says more, mtunet --version which version this is")
    elif verb == "--version":
        print(f"mtunet_dist {__version__}")
    else:
        raise InputError(f"unknown verb '{verb}'.{closest(verb, list(VERBS))} Available: {', '.join(VERBS)}")
