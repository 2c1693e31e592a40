"""Images/s, memory and FLOP/s of training steps of MT-UNet, full-width and narrow; the same command on CPU and GPU.

    python benchmarks/step.py --out benchmarks/results/step_cpu.md

Three parts: memory layouts, compilation, precisions and strategies with one process; batch sizes; and several processes
with one thread each against one, with the same batch per process (weak scaling). Every variant lives in processes of
its own, fed with random batches; variants take turns for ``--rounds`` rounds. Figures are medians. ``of matmul`` is the
model's arithmetic (convolutions and products, forward and backward) per second as a share of what the product of two
large square matrices reaches in the same precision, in turn with the steps. Memory is what building and training add
to the process (resident, with the libraries loaded on the way; on a GPU what is allocated there). ``key=value`` words
change the config of every variant.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from mtunet_dist import distributed
from mtunet_dist.config import Config, load_config
from mtunet_dist.core.step import DTYPES, build_step
from mtunet_dist.errors import InputError
from mtunet_dist.system import arguments
from mtunet_dist.system.command import command
from mtunet_dist.system.machine import cpus
from steps import TASKS, random_batch, training
from turns import Crew, Turn, about, markdown, median, take_turns

PARTS = ("modes", "batches", "processes")
WIDTHS = {"full": [], "narrow": ["model.widths=[8,16,32,64]", "model.bottleneck=128"]}  # narrow: nyuv2_narrow.yaml's
HEADER = ("variant", "images/s", "ratio", "CPU s per image", "memory (MiB)", "GFLOP/s", "of matmul")


@dataclass(frozen=True)
class Setting:
    """The settings that all variants share."""

    device: torch.device
    height: int
    width: int
    precisions: Sequence[str]
    overrides: Sequence[str]
    matrix: int  # rows and columns of the matrices whose product is the reference for FLOP/s
    rounds: int
    seconds: float  # approximate length of a turn

    @property
    def best_precision(self) -> str:
        """The settings for a training on this machine."""
        return "bf16" if self.device.type == "cuda" and "bf16" in self.precisions else "fp32"

    def config(self, batch: int, words: Sequence[str]) -> Config:
        """The config with ``batch`` samples over all processes."""
        paths = ["run_dir=unused", "data.root=unused"]
        return load_config(None, [*paths, f"batch_size={batch}", *words, *self.overrides])


@dataclass(frozen=True)
class Variant:
    """One row."""

    config: Config
    processes: int = 1
    threads: int = 0  # of each process; 0 = torch's default
    reduce: bool = True  # reduce gradients over the processes


def prepare_step(variant: Variant, height: int, width: int, device: torch.device) -> Callable[[], None]:
    """A training step, always on the same random batch."""
    train_on = training(variant.config, device, TASKS, reduce=variant.reduce)
    batch = random_batch(variant.config.batch_size // distributed.world_size(), height, width, device)
    return lambda: train_on(dict(batch))


def prepare_matmul(precision: str, size: int, device: torch.device) -> Callable[[], object]:
    """The product of two matrices."""
    a, b = torch.randn(2, size, size, device=device).to(DTYPES[precision])
    return lambda: a @ b


def flop_per_image(config: Config, height: int, width: int) -> int:
    """The FLOPs of a forward and a backward pass, counted from shapes only."""
    with torch.device("meta"):
        model = build_step(config, TASKS).model
        image = torch.empty(1, 3, height, width)
    with FlopCounterMode(display=False) as counter:
        sum(output.sum() for output in model(image).values()).backward()
    total: int = counter.get_total_flops()
    return total


def modes(setting: Setting, words: Sequence[str], batch: int) -> dict[str, Variant]:
    """Layouts, compilation, precisions, strategies. The first variant has torch's defaults."""
    rows = {f"{setting.precisions[0]}, NCHW": [f"precision={setting.precisions[0]}", "channels_last=false"]}
    for precision in setting.precisions:
        for compiled in (False, True):
            name = f"{precision}, channels-last{', compiled' if compiled else ''}"
            rows[name] = [f"precision={precision}", f"compile={str(compiled).lower()}"]
    for stage in range(4):
        name = f"{setting.best_precision}, channels-last, DeepSpeed stage {stage}"
        rows[name] = [f"precision={setting.best_precision}", "strategy.name=deepspeed", f"strategy.stage={stage}"]
    return {name: Variant(setting.config(batch, [*words, *row])) for name, row in rows.items()}


def batches(setting: Setting, words: Sequence[str], sizes: Sequence[int]) -> dict[str, Variant]:
    """Growing batches, eager and compiled, the largest last."""
    return {
        f"batch {size}{', compiled' if compiled == 'true' else ''}": Variant(
            setting.config(size, [*words, f"precision={setting.best_precision}", f"compile={compiled}"])
        )
        for compiled in ("false", "true")
        for size in sizes
    }


def processes(setting: Setting, words: Sequence[str], batch: int, most: int) -> dict[str, Variant]:
    """1, 2, 4 ... processes of one thread each with ``batch`` samples each.

    The last variant runs once more without reducing gradients. The speed still missing is lost to the shared machine.
    """
    counts = [2**n for n in range(most.bit_length()) if 2**n <= most]
    words = [*words, f"precision={setting.best_precision}"]
    rows = {f"{count} x batch {batch}": Variant(setting.config(count * batch, words), count, 1) for count in counts}
    name, last = list(rows.items())[-1]
    if last.processes > 1 and last.config.strategy["name"] == "ddp":
        rows[f"{name}, gradients not reduced"] = replace(last, reduce=False)
    return rows


def measure(setting: Setting, title: str, variants: dict[str, Variant]) -> str:
    """The table of one part."""
    first = next(iter(variants.values()))
    flop = flop_per_image(first.config, setting.height, setting.width)
    with ExitStack() as stack:
        crews: dict[str, Crew] = {}
        kinds = {(v.config.precision, v.processes, v.threads): None for v in variants.values()}
        for precision, count, threads in kinds:
            work = partial(prepare_matmul, precision, setting.matrix)
            crews[_matmul(precision, count)] = stack.enter_context(closing(_crew(setting, work, count, threads)))
        for name, variant in variants.items():
            step = partial(prepare_step, variant, setting.height, setting.width)
            crew = _crew(setting, step, variant.processes, variant.threads)
            crews[name] = stack.enter_context(closing(crew))
        turns = take_turns(crews, setting.rounds)
    rows, reference = [], 0.0
    for name, variant in variants.items():
        done = [turn for turn in turns[name] if turn is not None]
        if not done:
            rows.append([name, "does not fit", *[""] * 5])
            continue
        row = _row(done, turns[_matmul(variant.config.precision, variant.processes)], variant, flop, setting.matrix)
        reference = reference or row[0]
        rate, cpu, mib, achieved, share = row
        figures = (f"{rate:.3g}", f"{rate / reference:.2f}", f"{cpu:.3g}", f"{mib:.0f}", f"{achieved / 1e9:.0f}")
        rows.append([name, *figures, f"{share:.0%}"])
    return f"### {title}; {flop / 1e9:.3g} GFLOP per image\n\n{markdown(HEADER, rows)}"


def _row(
    done: Sequence[Turn], products: Sequence[Turn | None], variant: Variant, flop: int, matrix: int
) -> tuple[float, float, float, float, float]:
    """Images/s, CPU seconds per image, MiB, FLOP/s, and FLOP/s as a share of the matrix product's."""
    batch = variant.config.batch_size
    rate = batch * median(done, lambda turn: turn.steps / turn.seconds)
    made = [turn for turn in products if turn is not None]
    possible = variant.processes * 2 * matrix**3 * median(made, lambda turn: turn.steps / turn.seconds)
    cpu = median(done, lambda turn: turn.cpu_s / turn.steps) / batch
    return rate, cpu, median(done, lambda turn: turn.mib), rate * flop, rate * flop / possible


def _matmul(precision: str, processes: int) -> str:
    return f"{processes} x {precision} matrix product"


def _crew(setting: Setting, work: Callable[[torch.device], Callable[[], object]], count: int, threads: int) -> Crew:
    threads = threads or torch.get_num_threads()
    return Crew(work, seconds=setting.seconds, threads=threads, device=setting.device, processes=count)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--out", type=arguments.file(".md"), required=True, metavar="FILE", help="Markdown")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--width", nargs="+", choices=tuple(WIDTHS), default=tuple(WIDTHS))
    parser.add_argument("--size", default="128x256", metavar="HxW", help="of images")
    parser.add_argument("--without", nargs="+", default=[], metavar="WORD", help="leave out variants named so")
    parser.add_argument("--precision", nargs="+", choices=tuple(DTYPES), help="default: fp32, on a GPU all")
    parser.add_argument("--batch", type=int, metavar="N", help="of modes, and per process (default: 2, on a GPU 32)")
    parser.add_argument("--batches", nargs="+", type=int, metavar="N", help="default: on a GPU 8 to 256, else none")
    parser.add_argument("--processes", type=int, metavar="N", help="at most; default: one per GPU or core, at most 8")
    parser.add_argument("--matrix", type=int, metavar="N", help="rows of the matrices (default: 4096, on a GPU 8192)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="S", help="of a turn, about; at least one step")
    return parser.parse_intermixed_args()


@command
def main() -> None:
    """The command line."""
    args = parse()
    try:
        height, width = map(int, args.size.split("x"))
    except ValueError:
        raise InputError(f"--size={args.size} is not of the form HEIGHTxWIDTH, as 128x256") from None
    wanted = load_config(None, ["run_dir=unused", "data.root=unused", *args.overrides])
    device = distributed.pick_device(wanted.device)
    on_gpu = device.type == "cuda"
    precisions = args.precision or (list(DTYPES) if on_gpu else ["fp32"])
    matrix = args.matrix or (8192 if on_gpu else 4096)
    setting = Setting(device, height, width, precisions, args.overrides, matrix, args.rounds, args.seconds)
    batch = args.batch or (32 if on_gpu else 2)
    sizes = args.batches or ([8, 16, 32, 64, 128, 256] if on_gpu else [])
    most = args.processes or min(8, torch.cuda.device_count() if on_gpu else cpus())
    head = f"{about('step.py')}; {torch.get_num_threads()} threads; images of {height}x{width}; medians of "
    text = head + f"{args.rounds} rounds\n"
    for name in args.width:
        words = WIDTHS[name]
        parts = {
            "modes": (f"{name} width, batch {batch}", modes(setting, words, batch)),
            "batches": (f"{name} width, {setting.best_precision}, by batch size", batches(setting, words, sizes)),
            "processes": (f"{name} width, {setting.best_precision}, 1 thread", processes(setting, words, batch, most)),
        }
        for part in args.parts:
            title, variants = parts[part]
            variants = {n: variant for n, variant in variants.items() if not any(word in n for word in args.without)}
            if len(variants) > 1:
                text += "\n" + measure(setting, title, variants)
                args.out.write_text(text, encoding="utf-8")  # the results so far
    print(text)


if __name__ == "__main__":
    main()
