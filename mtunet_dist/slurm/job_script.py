"""Makes a batch script for one submission: a script of this folder with the job's options in its head."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mtunet_dist.errors import InputError


@dataclass(frozen=True)
class Options:
    """The options of a job. A profile (YAML) gives some of them; the command line gives the rest and has priority."""

    nodes: int = 1
    gpus: int = 0  # per node; 0 = train on CPUs
    cpus: int = 0  # per node; 0 = as many as the cluster gives
    processes: int = 1  # per node of a job without GPUs
    mem: str = ""  # per node, such as 64G
    time: str = ""  # the limit, such as 24:00:00 or 2-00:00:00
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    name: str = ""  # of the job; default: that of the run folder
    sbatch: tuple[str, ...] = ()  # further options of sbatch, such as --exclusive
    signal_s: int = 120  # the checkpoint is requested so many seconds before the time limit
    requeue: bool = True  # queue the job again after a stop on request
    chain: int = 1  # submit so many jobs in sequence; each continues where the time limit stopped the previous one
    seeds: tuple[int, ...] = ()  # one training for each, as an array of jobs
    grid: tuple[str, ...] = ()  # key=[value,...]: one training for each combination, as an array of jobs
    at_once: int = 0  # jobs of an array at a time; 0 = all
    setup: tuple[str, ...] = ()  # lines of shell at the beginning, such as module load cuda
    python: str = ""  # default: the one that submits; `python` if there are setup lines or a container
    container_image: str = ""  # for srun's --container-image (Pyxis); it must hold python and mtunet_dist
    container_mounts: tuple[str, ...] = ()  # such as /scratch:/scratch; the working folder is always mounted


@dataclass(frozen=True)
class Job:
    """The inputs of a batch script."""

    template: str  # the text of train.sbatch or sweep.sbatch
    options: Options
    home: Path  # the folder of the package: the repository, or site-packages
    folder: Path  # working folder of the job
    log: Path  # with Slurm's %j
    python: str
    words: tuple[str, ...]  # words of the training, or of every member of an array
    members: Sequence[tuple[str, ...]] = ()  # further words of each member of an array
    variables: dict[str, str] = field(default_factory=dict)
    origin: str = ""  # written in a comment


def render(job: Job) -> str:
    """The batch script as text. Raises InputError for text that no batch script can hold."""
    lines = job.template.splitlines()
    end = 1 + max(i for i, line in enumerate(lines) if line.startswith("#SBATCH "))
    head = [*lines[:end], *_directives(job), f"# {_one_line(job.origin)}", *job.options.setup]
    variables = {"MTUNET_HOME": str(job.home), "MTUNET_PYTHON": job.python, **job.variables}
    if not job.options.gpus:
        variables["MTUNET_CPU_PROCS"] = str(job.options.processes)
    if job.options.container_image:
        variables["MTUNET_CONTAINER"] = job.options.container_image
        head += _container(job)
    head += [f"export {name}={_quoted(value)}" for name, value in variables.items()]
    before, number, after = job.log.name.partition("%j")
    assert number
    head.append(f"job_output={_quoted(f'{job.log.parent}/{before}')}$SLURM_JOB_ID{_quoted(after)}")
    head.append(f"set -- {' '.join(map(_quoted, job.words))}")
    if job.members:
        head.append('case "$SLURM_ARRAY_TASK_ID" in')
        for i, words in enumerate(job.members):
            head.append(f'  {i}) set -- "$@" {" ".join(map(_quoted, words))} ;;')
        head.append("esac")
    return "\n".join([*head, *lines[end:]]) + "\n"


def _directives(job: Job) -> list[str]:
    """#SBATCH lines. They follow those of the template, because the last line of a name counts."""
    options = job.options
    asked = {
        "job-name": options.name,
        "chdir": str(job.folder),
        "output": str(job.log.parent).replace("%", "%%") + "/" + job.log.name,
        "nodes": str(options.nodes),
        "gpus-per-node": str(options.gpus or ""),
        "cpus-per-task": str(options.cpus or ""),
        "mem": options.mem,
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "constraint": options.constraint,
    }
    lines = [f"#SBATCH --{name}={_sbatch_quoted(value)}" for name, value in asked.items() if value]
    batch_only = "B:" if "--signal=B:" in job.template else ""
    lines.append(f"#SBATCH --signal={batch_only}USR1@{options.signal_s}")
    if job.members:
        at_once = f"%{options.at_once}" if options.at_once else ""
        lines.append(f"#SBATCH --array=0-{len(job.members) - 1}{at_once}")
    if not options.requeue or options.chain > 1:
        lines.append("#SBATCH --no-requeue")
    for word in options.sbatch:
        name, equals, value = word.partition("=")
        lines.append(f"#SBATCH {name}{equals}{_sbatch_quoted(value) if value else ''}")
    return lines


def _container(job: Job) -> list[str]:
    """Run every step in the container. Paths on the host stay the same there."""
    mounts = dict.fromkeys([*job.options.container_mounts, f"{job.folder}:{job.folder}"])
    words = [
        f"--container-image={job.options.container_image}",
        f"--container-mounts={','.join(mounts)}",
        f"--container-workdir={job.folder}",
    ]
    return [f'srun() {{ command srun {" ".join(map(_quoted, words))} "$@"; }}']


def _quoted(text: str) -> str:
    """``text`` quoted for bash."""
    return shlex.quote(_one_line(text))


def _sbatch_quoted(text: str) -> str:
    """``text`` for a #SBATCH line, which bash does not read."""
    text = _one_line(text)
    return text if re.fullmatch(r"[\w./:,@%+=-]+", text) else '"' + re.sub(r'(["\\#])', r"\\\1", text) + '"'


def _one_line(text: str) -> str:
    if "\n" in text or "\0" in text:
        raise InputError(f"{text!r} has more than one line, which no batch script can hold")
    return text
