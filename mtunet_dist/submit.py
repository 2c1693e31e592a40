"""Submit to Slurm: ``mtunet submit train|sweep|reproduce CONFIG [key=value...] --nodes=2 --time=24:00:00``.

Everything is checked before the job is submitted. The job's script is one of the folder ``slurm`` with the options in
its head. The script, the whole config, the state of the code and the logs are in RUN_DIR/slurm. Options are the fields
of ``Options`` in slurm/job_script.py; ``--profile`` names a YAML file with those that are the same for all jobs of a
cluster.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from mtunet_dist.config import Config, load_config
from mtunet_dist.config.typed_yaml import load_as, to_yaml
from mtunet_dist.data.order import TrainOrder
from mtunet_dist.data.prepared import PreparedDataset
from mtunet_dist.data.targets import check_targets
from mtunet_dist.errors import InputError, MTUNetError, closest
from mtunet_dist.runs.provenance import environment
from mtunet_dist.slurm.job_script import Job, Options, render
from mtunet_dist.system import arguments
from mtunet_dist.system.command import command
from mtunet_dist.system.files import write_json

HOME = Path(__file__).resolve().parents[1]  # of the package
SCRIPTS = HOME / "mtunet_dist" / "slurm"
TIME = re.compile(r"(\d+-)?\d+(:\d+){1,2}|\d+-\d+")


@dataclass(frozen=True)
class Work:
    """The parts of a job that a verb gets from its words."""

    folder: Path  # the run folder
    config: str  # text of the config file that the job reads, with its content of now
    words: tuple[str, ...]  # further words after that file
    members: tuple[tuple[str, ...], ...] = ()
    template: str = "train.sbatch"
    variables: dict[str, str] = dataclasses.field(default_factory=dict)


def train_work(words: Sequence[str], options: Options) -> Work:
    """A training, or an array of trainings. Raises InputError if one of them is not valid."""
    config = load_config(words[0], words[1:])
    folder = Path(config.run_dir)
    members = array(options)
    named = [(*member, f"run_dir={folder / name}") for member, name in zip(members, folder_names(members), strict=True)]
    for member in named or [()]:
        check_training(load_config(words[0], [*words[1:], *member]), options)
    # If a member names a plugin, the file's options of that section are dropped, but those of ``words`` stay.
    return Work(folder, to_yaml(config), tuple(words[1:]) if named else (), tuple(named))


def check_training(config: Config, options: Options) -> None:
    """Raise InputError for a config that would fail in the job."""
    if options.gpus and config.device == "cpu":
        raise InputError(f"device=cpu, but gpus={options.gpus}")
    if not options.gpus and config.device == "cuda":
        raise InputError("device=cuda needs --gpus=N")
    ranks = options.nodes * (options.gpus or options.processes)
    if not options.container_image:  # in a container the data may have another path
        dataset = PreparedDataset(Path(config.data.root))
        split = dataset.split(config.data.train)
        dataset.split(config.data.eval)
        check_targets(dataset.info, config.data.train, config.tasks)
        sizes = {"batch_size": config.batch_size, "accumulate": config.optim.accumulate}
        TrainOrder(len(split), **sizes, rank=0, world_size=ranks)


def array(options: Options) -> list[tuple[str, ...]]:
    """The overrides of each member: seeds times grid. None for a job without an array."""
    axes = [[f"seed={seed}" for seed in options.seeds]] if options.seeds else []
    for word in options.grid:
        key, equals, text = word.partition("=")
        values = yaml.safe_load(text) if equals else None
        if not key or not isinstance(values, list) or not values:
            raise InputError(f"grid: '{word}' is not of the form key=[value,value]")
        axes.append([f"{key}={value if isinstance(value, str) else json.dumps(value)}" for value in values])
    return list(itertools.product(*axes)) if axes else []


def folder_names(members: Sequence[tuple[str, ...]]) -> list[str]:
    """A name for each member from its overrides, without characters that a path cannot have."""
    names = [re.sub(r"[^\w.=,+-]", "_", ",".join(member)) for member in members]
    return names if len(set(names)) == len(names) else [f"{i},{name}" for i, name in enumerate(names)]


def sweep_work(words: Sequence[str], options: Options) -> Work:
    """A sweep. Raises InputError as mtunet sweep does."""
    from mtunet_dist.sweeps.config import check_trials, find_config, load_sweep

    sweep = load_sweep(Path(words[0]), words[1:])
    base = find_config(sweep, Path(words[0]))
    check_trials(sweep, base)
    if sweep.gpus_per_worker > options.gpus:
        raise InputError(f"gpus_per_worker={sweep.gpus_per_worker} needs --gpus of at least that many per node")
    if options.gpus and not sweep.gpus_per_worker:
        raise InputError(f"gpus={options.gpus}, but gpus_per_worker=0: the trials would train on CPUs; set either")
    if options.cpus and sweep.cpus_per_worker > options.cpus:
        raise InputError(f"cpus_per_worker={sweep.cpus_per_worker}, but a node of this job has cpus={options.cpus}")
    here = dataclasses.replace(sweep, config=str(base.resolve()))
    return Work(sweep.dir, to_yaml(here), (), template="sweep.sbatch")


def reproduce_work(words: Sequence[str], options: Options) -> Work:
    """A table of a paper, by one process on one node. Raises InputError as mtunet_dist.reproduce does."""
    from mtunet_dist import reproduce  # it imports matplotlib for its figures; other jobs need not wait for that

    if options.nodes > 1:
        raise InputError(f"nodes={options.nodes}: reproduce runs on one node")
    if len(options.seeds) > 1:
        raise InputError(f"seeds={list(options.seeds)}: reproduce takes their number, as --seeds=3")
    words = (*words, *(f"--seeds={number}" for number in options.seeds))
    args = reproduce.parser().parse_intermixed_args(words)
    targets = reproduce.targets_of([word for word in args.words if "=" not in word])
    if words[0] not in targets:
        raise InputError(f"name the table or figure first, before {words[0]}")
    folder = Path("runs") / folder_names([("reproduce", words[0])])[0]
    return Work(folder, "", words, variables={"MTUNET_MODULE": "mtunet_dist.reproduce"})


VERBS: dict[str, Callable[[Sequence[str], Options], Work]] = {
    "train": train_work,
    "sweep": sweep_work,
    "reproduce": reproduce_work,
}


def parse(words: Sequence[str]) -> tuple[argparse.Namespace, Options, list[str]]:
    """The command line: our own options, the job's options, and the words of the verb."""
    kinds = get_type_hints(Options)
    parser = arguments.parser("submit", __doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
    parser.add_argument("verb", choices=VERBS)
    parser.add_argument(
        "--profile", type=arguments.path, metavar="CLUSTER.yaml", help="options for all jobs on a cluster"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the script and submit nothing")
    parser.add_argument("--local", action="store_true", help="run the same script here, without Slurm")
    for name, kind in kinds.items():
        flag = "--" + name.replace("_", "-")
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None)
        elif kind in (int, str):
            parser.add_argument(flag)
        else:
            help_ = "A,B,C" if name == "seeds" else "once for each"
            parser.add_argument(flag, action="append", help=help_)
    args, rest = parser.parse_known_intermixed_args(words)
    unknown = [word.partition("=")[0] for word in rest if word.startswith("--")]
    if unknown and args.verb != "reproduce":
        valid = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
        raise InputError(
            f"unknown option {unknown[0]}.{closest(unknown[0], valid)} Available: {', '.join(sorted(valid))}"
        )
    if not rest:
        raise InputError(f"{args.verb} needs a {'TABLE' if args.verb == 'reproduce' else 'CONFIG'}")
    return args, options_of(args, kinds), rest


def options_of(args: argparse.Namespace, kinds: dict[str, Any]) -> Options:
    """The options of the profile, replaced by those of the command line. Raises InputError that names what is wrong."""
    overrides = []
    for name in kinds:
        value = getattr(args, name)
        if isinstance(value, list):
            items = ",".join(value).split(",") if name == "seeds" else value
            value = json.dumps([int(i) if name == "seeds" and i.strip().lstrip("-").isdigit() else i for i in items])
        if value is not None:
            overrides.append(f"{name}={str(value).lower() if isinstance(value, bool) else value}")
    options = load_as(Options, args.profile or {}, overrides)
    for name, least in {
        "nodes": 1,
        "gpus": 0,
        "cpus": 0,
        "processes": 1,
        "signal_s": 1,
        "chain": 1,
        "at_once": 0,
    }.items():
        if getattr(options, name) < least:
            raise InputError(f"{name}={getattr(options, name)} must be at least {least}")
    if options.time and not TIME.fullmatch(options.time):
        raise InputError(f"time={options.time} must be HH:MM:SS or D-HH:MM:SS")
    if args.verb != "train" and (options.grid or options.at_once or (options.seeds and args.verb == "sweep")):
        raise InputError(f"seeds, grid and at_once are for train, not for {args.verb}")
    if options.chain > 1 and (options.seeds or options.grid):
        raise InputError("chain is for one training, seeds and grid are for arrays")
    if args.local and (options.nodes > 1 or options.container_image):
        raise InputError("--local is for one node without a container")
    return options


def write(work: Work, options: Options) -> tuple[Path, str]:
    """Write script and config into the run folder. Returns the path and the text of the script."""
    folder = work.folder.resolve() / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    number = next(n for n in itertools.count(1) if not (folder / f"{n}.sbatch").exists())
    words = work.words
    if work.config:
        (folder / f"{number}.yaml").write_text(work.config, encoding="utf-8")
        words = (str(folder / f"{number}.yaml"), *words)
    own = "python" if options.setup or options.container_image else sys.executable
    job = Job(
        template=(SCRIPTS / work.template).read_text(encoding="utf-8"),
        options=dataclasses.replace(options, name=options.name or work.folder.resolve().name),
        home=HOME,
        folder=Path.cwd(),
        log=folder / "job-%j.log",
        python=options.python or own,
        words=words,
        members=work.members,
        variables=work.variables,
        origin=f"Submission {number} of {work.folder}; code {environment()['git'] or 'outside git'}",
    )
    script = folder / f"{number}.sbatch"
    text = render(job)
    script.write_text(text, encoding="utf-8")
    return script, text


def submit(script: Path, options: Options) -> list[str]:
    """Submit the script with sbatch, ``chain`` times. Returns the job ids. Raises MTUNetError with the message of
    sbatch."""
    jobs: list[str] = []
    try:
        for _ in range(options.chain):
            after = [f"--dependency=afternotok:{jobs[-1]}", "--kill-on-invalid-dep=yes"] if jobs else []
            jobs.append(_sbatch([*after, str(script)]))
    except MTUNetError as error:
        if jobs:
            raise MTUNetError(f"{error}; of the chain only {', '.join(jobs)} are queued") from None
        raise
    finally:
        if jobs:
            record = {**environment(), "jobs": jobs, "options": dataclasses.asdict(options)}
            write_json(script.with_suffix(".json"), record, indent=2)
    return jobs


def _sbatch(words: Sequence[str]) -> str:
    """Run sbatch and return the job id."""
    try:
        done = subprocess.run(["sbatch", "--parsable", *words], capture_output=True, text=True)
    except FileNotFoundError:
        raise InputError("there is no sbatch here; --local runs the job on this machine") from None
    if done.returncode:
        raise MTUNetError(f"sbatch refuses {words[-1]}: {' '.join(done.stderr.split())}")
    return done.stdout.strip().partition(";")[0]


def run_here(script: Path, members: int) -> int:
    """Run the script on this machine. An array's members run one after another, until one fails."""
    for member in range(members or 1):
        environment = {**os.environ, **({"SLURM_ARRAY_TASK_ID": str(member)} if members else {})}
        code = subprocess.call(["bash", str(SCRIPTS / "local.sh"), str(script)], env=environment)
        if code:
            return code
    return 0


@command
def main() -> None:
    """The command line."""
    args, options, words = parse(sys.argv[1:])
    if args.local and args.verb == "sweep":
        raise InputError("--local: mtunet sweep is a sweep on this machine")
    work = VERBS[args.verb](words, options)
    script, text = write(work, options)
    if args.dry_run:
        print(text, end="")
        print(f"written to {script}, not submitted", file=sys.stderr)
    elif args.local:
        sys.exit(run_here(script, len(work.members)))
    else:
        jobs = submit(script, options)
        log = script.parent / f"job-{jobs[0] if not work.members else '*'}.log"
        print(f"job {', '.join(jobs)}; script {script}")
        print(f"follow: tail -F {log}")
        print(f"state:  mtunet status {work.folder}; squeue -j {','.join(jobs)}")
        print(f"end it: scancel {' '.join(jobs)}")


if __name__ == "__main__":
    main()
