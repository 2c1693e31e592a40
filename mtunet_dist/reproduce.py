"""Train, measure and draw the paper's tables and figures: ``python -m mtunet_dist.reproduce table2``.

Each training is an ordinary run folder, made by its own process. The same command continues a stopped one, trains
nothing twice, and continues after a training that fails (exit code 1). ``docs/paper.md`` describes the tables and
figures.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from mtunet_dist.data.prepared import PreparedDataset
from mtunet_dist.errors import InputError, closest
from mtunet_dist.reproduction import claims
from mtunet_dist.reproduction.budgets import BUDGETS
from mtunet_dist.reproduction.experiments import DATASETS, STREETS, SYSTEMS, TARGETS, THE_USERS, Row, Target, target_on
from mtunet_dist.reproduction.figures import FIGURES
from mtunet_dist.reproduction.launching import LOG, Launcher, run_all
from mtunet_dist.reproduction.measuring import constant_metrics, measure_best
from mtunet_dist.reproduction.streets import prepare_streets, streets_root
from mtunet_dist.reproduction.table import Line, beside_the_paper, lines_of, markdown, published_lines, write_csv
from mtunet_dist.reproduction.trainings import PROTOCOLS, Setup, Training, configs, plan, settings
from mtunet_dist.system import arguments
from mtunet_dist.system.command import command
from mtunet_dist.system.folder_lock import lock_folder
from mtunet_dist.system.preemption import STOPPED_BY, StopRequest

FAILED = 1  # exit code: some training failed
INTERRUPTED = "Ctrl-C: the trainings that run write a checkpoint and stop; once more ends all at once"
SHOWN = ("miou", "accuracy", "depth_abs", "depth_rel")
CLAIMS = "claims"


class Reproduction:
    """Tables and figures, by name of ``TARGETS``, and their trainings. Raises InputError as ``plan``."""

    def __init__(self, targets: Mapping[str, Target], setup: Setup) -> None:
        self.setup = setup
        self.targets = targets
        self.plans = {name: plan(target, setup) for name, target in targets.items()}
        # Tables and figures share trainings, so each run folder counts once.
        self.trainings = {t.dir: t for trainings in self.plans.values() for t in trainings}
        self.failures: dict[Path, str] = {}
        self.ended = 0

    def run(self, launcher: Launcher) -> None:
        """Run the trainings that are not finished. After each one write its tables; at the end draw the figures.

        If one of ``STOPPED_BY`` comes, or the terminal closes, running trainings write checkpoints, and PreemptedError
        is raised.
        """
        todo = [t for t in self.trainings.values() if t.metrics is None]
        say(f"{len(self.trainings)} trainings, {len(self.trainings) - len(todo)} of them finished; in {self.setup.out}")
        if todo:
            say(f"what a training prints is in its folder, such as {todo[0].dir / LOG}")
        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # nohup
        with StopRequest(STOPPED_BY if ignored else (*STOPPED_BY, signal.SIGHUP), INTERRUPTED) as stop:
            run_all(todo, launcher, stop, self._ended)
        for name in self.plans:
            if name in FIGURES:
                self.draw(name)
            else:
                say(f"{name}: {self.write(name)}")

    def _ended(self, training: Training, failure: str | None) -> None:
        self.ended += 1
        if failure is not None:
            self.failures[training.dir] = failure
        elif training.metrics is None:
            measure_best(training)
        metrics = training.metrics or {}
        figures = "  ".join(f"{key} {metrics[key]:.4f}" for key in SHOWN if key in metrics)
        say(f"{self.ended} ended: {training.dir}  {figures if failure is None else f'FAILED: {failure}'}")
        for name, trainings in self.plans.items():
            if name not in FIGURES and training.dir in {t.dir for t in trainings}:
                self.write(name)

    def write(self, name: str) -> Path:
        """Write the table ``name``, or the claims, from the present results. Returns the path of the Markdown file."""
        file = self._file(name, "md")
        about = [self._about(name, dataset) for dataset in self.targets[name].datasets]
        if name == CLAIMS:
            text = claims.markdown(self.plans[name], self._stands_in(name), [*about, CLAIMS_ABOUT])
        else:
            text = self._table(name, [*about, TABLE_ABOUT], file.with_suffix(".csv"))
        file.write_text(text, encoding="utf-8")
        return file

    def _table(self, name: str, about: Sequence[str], csv_file: Path) -> str:
        target, trainings = self.targets[name], self.plans[name]
        lines = lines_of(trainings, target.rows)
        for dataset in target.datasets:
            first = next(t for t in trainings if t.row.dataset == dataset)
            constant = constant_metrics(first, self._reported_on(dataset))
            lines.append(Line("constant", "best constant", dataset, {key: [v] for key, v in constant.items()}))
            lines += published_lines(dataset, PreparedDataset(Path(self.setup.roots[dataset])).info)
        missing = {t.dir: self.failures.get(t.dir, "not finished") for t in trainings if t.metrics is None}
        notes = [f"{folder}: {reason}" for folder, reason in missing.items()]
        write_csv(csv_file, name, lines)
        return markdown(target.title, about, beside_the_paper(name, lines), lines, notes)

    def draw(self, name: str) -> None:
        """Draw the figure ``name`` from the finished trainings, if there are any."""
        done = [t for t in self.plans[name] if t.metrics is not None]
        if not done:
            say(f"{name}: not drawn, as none of its trainings is finished")
            return
        row, file = done[0].row, self._file(name, "png")
        split = PreparedDataset(Path(self.setup.roots[row.dataset])).split(self._reported_on(row.dataset))
        Image.fromarray(FIGURES[name](done, split)).save(file)
        left_out = len(self.plans[name]) - len(done)
        say(f"{name}: {file}" + (f", without {left_out} trainings that failed" if left_out else ""))

    def _file(self, name: str, suffix: str) -> Path:
        on = f"-{STREETS}" if self._stands_in(name) else ""
        return self.setup.out / self.setup.budget_name / f"{name}{on}{self.setup.part}.{suffix}"

    def _stands_in(self, name: str) -> bool:
        return any(DATASETS[dataset].kind == STREETS for dataset in self.targets[name].datasets)

    def _reported_on(self, dataset: str) -> str:
        """The split that the figures show."""
        known = DATASETS[dataset]
        return self.setup.splits(known).test if self.setup.validation else known.report.test

    def _about(self, name: str, dataset: str) -> str:
        known, budget = DATASETS[dataset], self.setup.budget_name
        config = next(t for t in self.plans[name] if t.row.dataset == dataset).config
        info = PreparedDataset(Path(self.setup.roots[dataset])).info
        train, test = config.data.train, self._reported_on(dataset)
        counts = {s: sum(info.splits[part].count for part in s.split("+")) for s in (train, test)}
        once = " once" if self.setup.protocol == "last" and not self.setup.validation else ""
        changed = f" and {' '.join(self.setup.overrides)}" if self.setup.overrides else ""
        unit = info.targets["depth"].unit_text
        stand_in = " **These are not Cityscapes, but rendered scenes that stand in for it.**" * (known.kind == STREETS)
        return (
            f"{known.title}, {info.height}x{info.width}; trained on {train} ({counts[train]} images), measured on "
            f"{test} ({counts[test]}){once}: {PROTOCOLS[self.setup.protocol]} of {config.epochs}. "
            f"Depth errors in {unit}. "
            f"Budget {budget}{changed}: batch {config.batch_size}, {config.optim.name} {config.optim.lr:g}, "
            f"{config.precision}.{stand_in}"
        )


TABLE_ABOUT = (
    "Mean ± standard deviation (n - 1) over seeds. Δm: mean relative gain over the single-task networks of the same "
    "family on the same data. legacy: averages per image or batch, as in the code of MTAN; the others are over the "
    'whole set. "IoU" in the paper is pixel accuracy. minutes: in training steps. See docs/paper.md.'
)
CLAIMS_ABOUT = (
    "Differences are times 100, as in the paper, also those of errors; positive means that the claim points the right "
    "way. Ours: mean ± standard deviation over seeds, of the figures that are averages per image or batch. A direction "
    f"counts as {claims.HOLDS} or {claims.FAILS} where the mean is more than two standard errors from zero; with one "
    "seed nothing can be told. See docs/paper.md."
)


def listing(targets: Mapping[str, Target], setup: Setup) -> list[str]:
    """All trainings of a command: one line per row and one with its settings. It needs no dataset."""
    lines, seen = [], set[Row]()
    for name, target in targets.items():
        lines.append(f"{name}: {target.title}")
        for row in target.all_rows:
            made = configs(row, target, setup)
            whose = "ours" if row in target.further or name == "ablations" else "paper"
            again = ", as above" if row in seen else ""
            seeds = f"{len(made)} seed{'s' * (len(made) > 1)}"
            lines.append(
                f"  {SYSTEMS[row.system].title} | {DATASETS[row.dataset].title} | {whose} | {seeds}{again} | "
                f"{made[0].run_dir.rpartition('/')[0]}"
            )
            if not again:
                lines.append(f"      {' '.join(settings(row, setup))}")
            seen.add(row)
    return lines


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def targets_of(words: Sequence[str]) -> list[str]:
    """The tables and figures that ``words`` name; ``all`` means all of them. InputError for an unknown name."""
    for word in words:
        if word not in (*TARGETS, "all"):
            near = closest(word, [*TARGETS, "all"])
            raise InputError(f"unknown table or figure '{word}'.{near} Available: {', '.join(TARGETS)}, all")
    return list(TARGETS) if "all" in words else list(dict.fromkeys(words))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = arguments.parser("reproduce", __doc__.splitlines()[0])
    made.add_argument("words", nargs="+", metavar="TARGET", help=f"{', '.join(TARGETS)} or all; key=value for all runs")
    made.add_argument("--budget", choices=list(BUDGETS), default="smoke", help="widths, epochs and seeds")
    made.add_argument("--out", type=arguments.folder, default=Path("runs/reproduce"), help="default %(default)s")
    made.add_argument(
        "--on",
        choices=[STREETS, *THE_USERS],
        help="streets: synthetic streets, which this command makes, instead of Cityscapes; others: for ablations",
    )
    made.add_argument("--list", action="store_true", help="only print what would be trained, with all settings")
    made.add_argument("--seeds", type=int, metavar="N", help="trainings of each system (default: the budget's)")
    made.add_argument(
        "--protocol", choices=list(PROTOCOLS), default="last", help="; ".join(f"{k}: {v}" for k, v in PROTOCOLS.items())
    )
    made.add_argument("--validate", action="store_true", help="choose settings: leave the test split alone")
    made.add_argument(
        "--launcher",
        metavar="COMMAND",
        help="starts a training and ends with it; {config} stands for its config file (default: torchrun here); on a "
        "cluster: 'sbatch --wait --gpus-per-node=4 slurm/train.sbatch {config}'",
    )
    made.add_argument("--jobs", type=int, default=1, metavar="N", help="trainings at a time (default 1)")
    for name in THE_USERS:
        made.add_argument(
            f"--{name}",
            type=arguments.home,
            metavar="DIR",
            default=f"data/{name}",
            help="prepared; default %(default)s",
        )
    made.add_argument(
        f"--{STREETS}",
        metavar="DIR",
        type=arguments.path,
        default=Path("data"),
        help="where --on streets writes; default data",
    )
    return made


def setup_of(args: argparse.Namespace) -> tuple[dict[str, Target], Setup]:
    """The targets of a command line, and the common settings of their trainings. InputError for wrong words."""
    overrides = tuple(word for word in args.words if "=" in word)
    names = targets_of([word for word in args.words if "=" not in word])
    if not names:
        raise InputError(f"name a table or figure: {', '.join(TARGETS)}, all")
    if args.seeds is not None and args.seeds < 1:
        raise InputError(f"--seeds={args.seeds} must be at least 1")
    budget = BUDGETS[args.budget]
    roots = {name: getattr(args, name) for name in THE_USERS}
    for name, dataset in DATASETS.items():
        if dataset.kind == STREETS:
            roots[name] = str(streets_root(args.streets, dataset.classes, budget.streets_size))
    setup = Setup(
        out=args.out,
        budget_name=args.budget,
        budget=budget,
        roots=roots,
        overrides=overrides,
        seeds=args.seeds,
        validation=args.validate,
        protocol=args.protocol,
    )
    return {name: target_on(name, args.on) for name in names}, setup


@command
def main() -> None:
    """Exit code 0 if all is finished, 1 if a training failed, 75 if stopped on request."""
    args = parser().parse_intermixed_args()
    launcher = Launcher(args.launcher, args.jobs)
    targets, setup = setup_of(args)
    if args.list:
        print("\n".join(listing(targets, setup)))
        return
    datasets = dict.fromkeys(name for target in targets.values() for name in target.datasets)
    streets = [DATASETS[name] for name in datasets if DATASETS[name].kind == STREETS]
    if streets:
        check_settings(targets, setup)  # drawing takes minutes
    for dataset in streets:
        prepare_streets(args.streets, dataset.classes, setup.budget.streets_size)
    reproduction = Reproduction(targets, setup)
    folder = args.out / args.budget
    with lock_folder(folder, f"another reproduce is running in {folder}"):
        reproduction.run(launcher)
    if reproduction.failures:
        say(f"{len(reproduction.failures)} trainings failed; the same command tries them again")
        sys.exit(FAILED)


def check_settings(targets: Mapping[str, Target], setup: Setup) -> None:
    """Raise InputError for settings that are wrong for any data, before streets are drawn."""
    for target in targets.values():
        for row in target.all_rows:
            configs(row, target, setup)


if __name__ == "__main__":
    main()
