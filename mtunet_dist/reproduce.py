"""Train, measure and draw what the paper's tables and figures show: ``python -m mtunet_dist.reproduce table2``.

Each training is an ordinary run folder, made by a process of its own; the same command goes on where it was stopped,
trains nothing twice, and passes over a training that fails (exit code 1). ``docs/paper.md`` says what each is.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mtunet_dist.baselines import ConstantPredictor
from mtunet_dist.data.order import EvalOrder
from mtunet_dist.data.prepared import PreparedDataset
from mtunet_dist.data.torch_loader import TorchLoader
from mtunet_dist.errors import InputError, closest, command
from mtunet_dist.evaluate import evaluate
from mtunet_dist.files import write_json
from mtunet_dist.folder_lock import lock_folder
from mtunet_dist.multitask import make_tasks
from mtunet_dist.preemption import SIGNALS, StopRequest
from mtunet_dist.records import read_note
from mtunet_dist.reproduction.budgets import BUDGETS
from mtunet_dist.reproduction.experiments import DATASETS, TARGETS, Target
from mtunet_dist.reproduction.figures import CPU, FIGURES
from mtunet_dist.reproduction.launching import LOG, Launcher, run_all
from mtunet_dist.reproduction.table import Row, markdown, published_rows, rows_of, write_csv
from mtunet_dist.reproduction.trainings import Setup, Training, plan

FAILED = 1  # exit code: some training failed
STOPPED_BY = (signal.SIGINT, *SIGNALS)
SHOWN = ("miou", "accuracy", "depth_abs", "depth_rel")


class Reproduction:
    """Tables and figures, by name of ``TARGETS``, and the trainings they need. Raises InputError as ``plan``."""

    def __init__(self, names: Sequence[str], setup: Setup) -> None:
        self.setup = setup
        self.plans = {name: plan(TARGETS[name], setup) for name in names}
        # Tables and figures share trainings: a run folder is one.
        self.trainings = {t.dir: t for trainings in self.plans.values() for t in trainings}
        self.failures: dict[Path, str] = {}
        self.ended = 0

    def run(self, launcher: Launcher) -> None:
        """Train what is not trained yet; after each training write the tables it is in, in the end the figures.

        Raises PreemptedError if one of ``STOPPED_BY`` comes, or the terminal goes, while trainings run; they then leave
        checkpoints.
        """
        todo = [t for t in self.trainings.values() if t.metrics is None]
        say(f"{len(self.trainings)} trainings, {len(self.trainings) - len(todo)} of them finished; in {self.setup.out}")
        if todo:
            say(f"what a training prints is in its folder, such as {todo[0].dir / LOG}")
        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # nohup
        with StopRequest(STOPPED_BY if ignored else (*STOPPED_BY, signal.SIGHUP)) as stop:
            run_all(todo, launcher, stop, self._ended)
        for name in self.plans:
            if name in FIGURES:
                self.draw(name)
            else:
                say(f"{name}: {self.write_table(name)}")

    def _ended(self, training: Training, failure: str | None) -> None:
        self.ended += 1
        if failure is not None:
            self.failures[training.dir] = failure
        metrics = training.metrics or {}
        figures = "  ".join(f"{key} {metrics[key]:.4f}" for key in SHOWN if key in metrics)
        say(f"{self.ended} ended: {training.dir}  {figures if failure is None else f'FAILED: {failure}'}")
        for name, trainings in self.plans.items():
            if name not in FIGURES and training.dir in {t.dir for t in trainings}:
                self.write_table(name)

    def write_table(self, name: str) -> Path:
        """Write the table ``name`` from what there is by now: NAME.csv, and NAME.md, whose path it returns."""
        target, trainings = TARGETS[name], self.plans[name]
        dataset = PreparedDataset(Path(self.setup.roots[target.dataset]))
        rows = [
            constant_row(trainings[0], dataset),
            *rows_of(trainings),
            *published_rows(target.dataset, dataset.info),
        ]
        missing = {t.dir: self.failures.get(t.dir, "not finished") for t in trainings if t.metrics is None}
        notes = [f"{folder}: {reason}" for folder, reason in missing.items()]
        text = markdown(target.title, self._about(target, trainings[0], dataset), rows, notes)
        file = self._file(name, "md")
        file.write_text(text, encoding="utf-8")
        write_csv(file.with_suffix(".csv"), rows)
        return file

    def draw(self, name: str) -> None:
        """Draw the figure ``name`` from the trainings that are finished, if any is."""
        done = [t for t in self.plans[name] if t.metrics is not None]
        if not done:
            say(f"{name}: not drawn, as none of its trainings is finished")
            return
        config = done[0].config
        file = self._file(name, "png")
        split = PreparedDataset(Path(config.data.root)).split(config.data.eval)
        Image.fromarray(FIGURES[name](done, split)).save(file)
        left_out = len(self.plans[name]) - len(done)
        say(f"{name}: {file}" + (f", without {left_out} trainings that failed" if left_out else ""))

    def _file(self, name: str, suffix: str) -> Path:
        part = "-validation" if self.setup.validation else ""
        return self.setup.out / self.setup.budget_name / f"{name}{part}.{suffix}"

    def _about(self, target: Target, training: Training, dataset: PreparedDataset) -> list[str]:
        config, info, budget = training.config, dataset.info, self.setup.budget_name
        splits = self.setup.splits(target)
        counts = {s: sum(info.splits[part].count for part in s.split("+")) for s in (splits.train, splits.test)}
        once = "" if splits == DATASETS[target.dataset].validation else " once"
        changed = f" and {' '.join(self.setup.overrides)}" if self.setup.overrides else ""
        return [
            f"{DATASETS[target.dataset].title}, {len(info.classes)} classes, {info.height}x{info.width}; trained on "
            f"{splits.train} ({counts[splits.train]} images), measured on {splits.test} ({counts[splits.test]}){once}, "
            f"with the weights after the last of {config.epochs} epochs. Budget {budget}{changed}: batch "
            f"{config.batch_size}, {config.optim.name} {config.optim.lr:g}, {config.precision}.",
            "Mean ± standard deviation (n - 1) over seeds. Depth errors in "
            f"{'metres' if info.depth.unit == 'metre' else 'the unit of inverse depth'}. Δm: mean relative gain over "
            "the single-task networks of the same family. legacy: averages per image or batch. minutes: in training "
            "steps. See docs/paper.md.",
        ]


def constant_row(training: Training, dataset: PreparedDataset) -> Row:
    """What a network that does not look at the image can reach; kept in a file beside the runs."""
    config = training.config
    train, test = dataset.split(config.data.train), dataset.split(config.data.eval)
    file = training.dir.parent.parent / "constant.json"
    key = [train.fingerprint, test.fingerprint, config.eval_batch_size]
    known = read_note(file)
    if known.get("of") != key or not isinstance(known.get("metrics"), dict):
        tasks = make_tasks(config.tasks, dataset.info.classes, dataset.info.depth)
        loader = TorchLoader(test, EvalOrder(len(test), batch_size=config.eval_batch_size), CPU)
        known = {"of": key, "metrics": evaluate(ConstantPredictor(tasks, train), loader, CPU).as_dict()["metrics"]}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, known)
    return Row("constant", "best constant", {name: [v] for name, v in known["metrics"].items() if v is not None})


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def targets_of(words: Sequence[str]) -> list[str]:
    """The tables and figures that ``words`` name, ``all`` meaning each. InputError for a name there is none of."""
    for word in words:
        if word not in (*TARGETS, "all"):
            near = closest(word, [*TARGETS, "all"])
            raise InputError(f"unknown table or figure '{word}'.{near} Available: {', '.join(TARGETS)}, all")
    return list(TARGETS) if "all" in words else list(dict.fromkeys(words))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m mtunet_dist.reproduce", description=__doc__.splitlines()[0])
    made.add_argument("words", nargs="+", metavar="TARGET", help=f"{', '.join(TARGETS)} or all; key=value for all runs")
    made.add_argument("--budget", choices=list(BUDGETS), default="smoke", help="widths, epochs and seeds")
    made.add_argument("--out", type=Path, default=Path("runs/reproduce"), help="default %(default)s")
    made.add_argument("--seeds", type=int, metavar="N", help="trainings of each system (default: the budget's)")
    made.add_argument("--validate", action="store_true", help="choose settings: leave the test split alone")
    made.add_argument(
        "--launcher",
        metavar="COMMAND",
        help="starts a training and ends with it; {config} stands for its config file (default: torchrun here); on a "
        "cluster: 'sbatch --wait --gpus-per-node=4 slurm/train.sbatch {config}'",
    )
    made.add_argument("--jobs", type=int, default=1, metavar="N", help="trainings at a time (default 1)")
    for name, dataset in DATASETS.items():
        made.add_argument(f"--{name}", metavar="DIR", default=dataset.root, help="prepared; default %(default)s")
    return made


@command
def main() -> None:
    """Exit code 0 if all is there, 1 if a training failed, 75 if stopped on request."""
    args = parser().parse_intermixed_args()
    overrides = tuple(word for word in args.words if "=" in word)
    names = targets_of([word for word in args.words if "=" not in word])
    if not names:
        raise InputError(f"name a table or figure: {', '.join(TARGETS)}, all")
    if args.seeds is not None and args.seeds < 1:
        raise InputError(f"--seeds={args.seeds} must be at least 1")
    launcher = Launcher(args.launcher, args.jobs)
    setup = Setup(
        out=args.out,
        budget_name=args.budget,
        budget=BUDGETS[args.budget],
        roots={name: getattr(args, name) for name in DATASETS},
        overrides=overrides,
        seeds=args.seeds,
        validation=args.validate,
    )
    reproduction = Reproduction(names, setup)
    folder = args.out / args.budget
    with lock_folder(folder, f"another reproduce is running in {folder}"):
        reproduction.run(launcher)
    if reproduction.failures:
        say(f"{len(reproduction.failures)} trainings failed; the same command tries them again")
        sys.exit(FAILED)


if __name__ == "__main__":
    main()
