"""The checks of ``gpu_check.py``: their names, time limits, expected results and code."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from mtunet_dist.config import Config, load_config
from mtunet_dist.core.step import Batch, build_step, place, share_valid_counts
from mtunet_dist.data.loader import make_augmentation, make_loader
from mtunet_dist.data.order import EvalOrder, TrainOrder
from mtunet_dist.data.prepared import PreparedDataset
from mtunet_dist.prepare import prepare
from mtunet_dist.runs import checkpoint, provenance
from mtunet_dist.synthesize import synthesize
from mtunet_dist.synthetic.tree import Settings
from mtunet_dist.system import records
from steps import TASKS, random_batch, training
from throughput import seconds

DRY_SECONDS = 200.0  # the least time limit of a check on a CPU
NARROW = ("model.widths=[8,16,32,64]", "model.bottleneck=128")
TFLOP_PER_IMAGE = 0.448  # a step of MT-UNet at full width, 128x256
SLEEP_CYCLES = int(2e9)  # of the GPU's clock: about a second
NO_GPU = "there is no GPU"


@dataclass(frozen=True)
class Found:
    """The result of a check. ``good`` is None if the check could not run here."""

    good: bool | None
    text: str


@dataclass(frozen=True)
class Check:
    """``run(out, dry)`` works in the folder ``out``; with ``dry`` on the CPU, with small sizes."""

    seconds: float  # on an H200
    expected: str
    run: Callable[[Path, bool], Found]


def _device(dry: bool) -> torch.device:
    return torch.device("cpu") if dry else torch.device("cuda", 0)


def _config(root: Path, *words: str) -> Config:
    return load_config(None, [f"run_dir={root / 'unused'}", f"data.root={root}", *words])


def _data(out: Path) -> Path:
    """A small prepared dataset, made by the first check that needs it."""
    source, prepared = out / "streets_source", out / "streets"
    workers = len(os.sched_getaffinity(0))
    synthesize(source, Settings(48, 16, 0, 256, 512), workers)
    prepare("cityscapes", source, prepared, height=128, width=256, workers=workers)
    return prepared


def _missing(*packages: str) -> str | None:
    """Name the first of ``packages`` that is not installed. A package stands behind the one that contains it."""
    lacking = next((package for package in packages if importlib.util.find_spec(package) is None), None)
    return f"{lacking} is not installed" if lacking else None


def versions(out: Path, dry: bool) -> Found:
    """The hardware and versions on which bits and speed depend."""
    found = provenance.fingerprint()
    return Found(dry or torch.cuda.is_available(), ", ".join(f"{k} {v}" for k, v in found.items() if v != "none"))


def matmul(out: Path, dry: bool) -> Found:
    """The rate of a large matrix product, the reference for all other rates."""
    size, device = (256, _device(dry)) if dry else (8192, _device(dry))
    a, b = torch.randn(2, size, size, device=device).to(torch.float32 if dry else torch.bfloat16)
    rate = 2 * size**3 / _seconds(lambda: a @ b, 20, device) / 1e12
    return Found(None if dry else rate > 400, f"{rate:.1f} TFLOP/s")


def narrow_fp32(out: Path, dry: bool) -> Found:
    """Gradients on the GPU compared with the CPU's, with TF32 off."""
    config = _config(out, *NARROW, "model.dropout=0.0")
    losses, gradients = zip(
        *(_gradients(config, device) for device in (torch.device("cpu"), _device(dry))), strict=True
    )
    apart = max(_apart(a, b) for a, b in zip(*gradients, strict=True))
    return Found(apart < 1e-4, f"largest relative difference {apart:.1e}; losses {losses[0]:.6f} and {losses[1]:.6f}")


def narrow_bf16(out: Path, dry: bool) -> Found:
    """The loss in bf16 compared with fp32."""
    device = _device(dry)
    full, half = (
        _gradients(_config(out, *NARROW, "model.dropout=0.0", f"precision={p}"), device)[0] for p in ("fp32", "bf16")
    )
    apart = abs(half - full) / full
    return Found(apart < 2e-2, f"relative difference of the losses {apart:.1e}")


def fp16_overflow(out: Path, dry: bool) -> Found:
    """A step whose gradients overflow is skipped, and the loss scale is halved."""
    if dry:
        return Found(None, NO_GPU)
    from mtunet_dist.strategies.ddp import DDPStrategy

    config, device = _config(out, *NARROW, "precision=fp16"), _device(dry)
    strategy = DDPStrategy(build_step(config, TASKS), config, device)
    before = [p.detach().clone() for p in strategy.module.parameters()]
    scale = strategy.loss_scale
    batch = random_batch(2, 128, 256, device)
    share_valid_counts([batch], strategy.module.tasks)
    total, _ = strategy(batch)
    strategy.backward(total * 1e30)
    strategy.apply(1e-3)
    same = all(torch.equal(a, b) for a, b in zip(before, strategy.module.parameters(), strict=True))
    return Found(
        same and strategy.loss_scale == scale / 2, f"weights kept: {same}; scale {scale:g} to {strategy.loss_scale:g}"
    )


def mixed_decoding(out: Path, dry: bool) -> Found:
    """DALI's pixels compared with PIL's, with and without the GPU's JPEG engine; augmented ones with the torch
    loader's."""
    if lacking := _missing("nvidia", "nvidia.dali"):
        return Found(None, lacking)
    root, worst, device = _data(out), {}, _device(dry)
    for load in ("0.0", "1.0"):
        config = _config(root, f"data.dali.hw_decoder_load={load}", "batch_size=8")
        worst[f"hw_decoder_load {load}"] = _against_pil(config, device)
    augmented = ["data.augment.flip=true", "data.augment.scales=[1.0,1.5]", "batch_size=8"]
    pair = [_first(_config(root, f"data.loader={name}", *augmented), device, 2) for name in ("dali", "torch")]
    worst["augmented"] = max(_differences(a, b) for a, b in zip(*pair, strict=True))
    good = all(rgb <= 3 and label == 0 and depth == 0 for rgb, label, depth in worst.values())
    text = "; ".join(
        f"{name}: RGB {rgb:g}, labels {label:g}, depth {depth:g}" for name, (rgb, label, depth) in worst.items()
    )
    return Found(good, text)


def dali_memory(out: Path, dry: bool) -> Found:
    """Batches are read long after they were handed out, while DALI continues to decode."""
    if lacking := _missing("nvidia", "nvidia.dali"):
        return Found(None, lacking)
    root, device = _data(out), _device(dry)
    config = _config(root, "batch_size=4")
    split = PreparedDataset(root).split("train")
    loader = make_loader(config.data, split, TrainOrder(len(split), batch_size=4), device)
    wrong = 0
    for batch in islice(loader.batches(), 12):
        if device.type == "cuda":
            torch.cuda._sleep(SLEEP_CYCLES // 10)
        late = batch["image"].float().mean((1, 2, 3))  # queued behind the sleep
        expected = [split.decode(i).rgb.astype("float32").mean() for i in batch["sample"].tolist()]
        wrong += int((late.cpu() - torch.tensor(expected)).abs().max() > 1.0)
    return Found(wrong == 0, f"{wrong} of 12 batches hold other pixels")


def stalls(out: Path, dry: bool) -> Found:
    """The time that the host waits for a cached, augmented batch while the GPU is busy."""
    root, device = _data(out), _device(dry)
    words = ["data.cache=host", "data.augment.flip=true", "data.augment.scales=[1.0,1.2,1.5]", "batch_size=8"]
    config = _config(root, *words)
    batches = _batches(config, device)
    for _ in range(3):
        next(batches)
    waits = []
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda._sleep(SLEEP_CYCLES // 4)
        start = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - start)
    wait = 1000 * statistics.median(waits)
    return Found(None if dry else wait < 60, f"{wait:.1f} ms, while the GPU sleeps for about 250 ms")


def stop_and_resume(out: Path, dry: bool) -> Found:
    """torchrun over NCCL: after a request to stop it exits with 75, and the resumed run ends like an
    uninterrupted one."""
    root = _data(out)
    words = [
        f"data.root={root}",
        *NARROW,
        "data.cache=host",
        "epochs=4",
        "batch_size=8",
        "log.every_steps=1",
        "log.pictures=0",
    ]
    words += ["eval_every_epochs=0", f"device={'cpu' if dry else 'cuda'}"]
    config = Path(__file__).parent.parent / "configs" / "nyuv2_narrow.yaml"
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    line += ["--signals-to-handle=SIGUSR1,SIGTERM", "-m", "mtunet_dist.train", str(config), *words]
    stopped, straight = out / "stopped", out / "straight"
    process = subprocess.Popen([*line, f"run_dir={stopped}"])
    while process.poll() is None and len(records.metrics(stopped, "train")) < 5:
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    process.wait()
    steps = checkpoint.by_age(stopped / "checkpoints")
    if not steps:
        return Found(False, f"no checkpoint after SIGUSR1, exit code {process.returncode}")
    for folder in (stopped, straight):
        subprocess.run([*line, f"run_dir={folder}"], check=True)
    a, b = (checkpoint.load(checkpoint.by_age(f / "checkpoints")[0])["strategy"]["model"] for f in (stopped, straight))
    apart = max(_apart(a[name].float(), b[name].float()) for name in a)
    return Found(
        apart < 1e-3, f"stopped at step {checkpoint.step_of(steps[0])}; largest difference at the end {apart:.1e}"
    )


def speed(out: Path, dry: bool) -> Found:
    """Steps at full width: eager, cudnn.benchmark, compiled, CUDA graphs, at batch 2, 8 and 32."""
    device, lines, best = _device(dry), [], 0.0
    sizes, size = ((1,), (32, 64)) if dry else ((2, 8, 32), (128, 256))
    variants: dict[str, list[str]] = {"eager": [], "benchmark": []} | ({} if dry else {"compiled": ["compile=true"]})
    if not dry:
        variants["graphs"] = ["compile=true", "compile_mode=reduce-overhead"]
    for name, words in variants.items():
        torch.backends.cudnn.benchmark = name != "eager"
        for batch in sizes:
            if name == "graphs" and batch > 8:
                continue
            precision = "fp32" if dry else "bf16"
            config = _config(out, f"batch_size={batch}", f"precision={precision}", *words, *(NARROW if dry else ()))
            train_on, data = training(config, device, TASKS), random_batch(batch, *size, device)
            rate = batch / _seconds(lambda t=train_on, d=data: t(dict(d)), 10, device)  # type: ignore[misc]
            best = max(best, rate)
            lines.append(f"{name} {batch}: {rate:.1f}")
            print(lines[-1], "images/s", flush=True)
    return Found(None if dry else best * TFLOP_PER_IMAGE > 400, "images/s: " + ", ".join(lines))


def throughput(out: Path, dry: bool) -> Found:
    """Loading alone, by loader."""
    root, device, rates = _data(out), _device(dry), {}
    for name, words in {"dali": [], "torch": ["data.loader=torch"], "cache=device": ["data.cache=device"]}.items():
        if name == "dali" and _missing("nvidia", "nvidia.dali"):
            continue
        batches = _batches(_config(root, "batch_size=16", *words), device)
        rates[name] = 16 / _seconds(lambda b=batches: next(b), 20, device)  # type: ignore[misc]
    return Found(
        None if dry else max(rates.values()) > 1000, "images/s: " + ", ".join(f"{k} {v:.0f}" for k, v in rates.items())
    )


def deepspeed_stages(out: Path, dry: bool) -> Found:
    """Losses of some steps under ZeRO compared with DDP's."""
    if lacking := _missing("deepspeed"):
        return Found(None, lacking)
    losses = {}
    for name in ("ddp", "0", "1", "2", "3"):
        strategy = ["strategy.name=ddp"] if name == "ddp" else ["strategy.name=deepspeed", f"strategy.stage={name}"]
        words = [f"data.root={_data(out)}", f"run_dir={out / f'zero_{name}'}", *NARROW, "model.dropout=0.0", *strategy]
        words += [
            "epochs=1",
            "batch_size=8",
            "log.every_steps=1",
            "log.pictures=0",
            f"device={'cpu' if dry else 'cuda'}",
        ]
        config = Path(__file__).parent.parent / "configs" / "nyuv2_narrow.yaml"
        subprocess.run([sys.executable, "-m", "mtunet_dist.train", str(config), *words], check=True)
        losses[name] = [r["loss/total"] for r in records.metrics(out / f"zero_{name}", "train")]
    apart = {
        k: max(abs(a - b) / b for a, b in zip(v, losses["ddp"], strict=True)) for k, v in losses.items() if k != "ddp"
    }
    return Found(max(apart.values()) < 1e-3, json.dumps({f"stage {k}": float(f"{v:.1e}") for k, v in apart.items()}))


CHECKS: dict[str, Check] = {
    "versions": Check(10, "a GPU, a driver for CUDA 13", versions),
    "matmul": Check(10, "770 to 800 TFLOP/s in bf16 on an H200", matmul),
    "narrow_fp32": Check(10, "gradients within 1e-4 of the CPU's", narrow_fp32),
    "narrow_bf16": Check(10, "loss within 2e-2 of fp32's", narrow_bf16),
    "fp16_overflow": Check(10, "the step is left out, the scale halved", fp16_overflow),
    "mixed_decoding": Check(40, "RGB within 3 levels, labels and depth equal", mixed_decoding),
    "dali_memory": Check(30, "no batch holds other pixels", dali_memory),
    "stalls": Check(15, "far less than the GPU's 250 ms", stalls),
    "stop_and_resume": Check(60, "a checkpoint, and the same weights at the end", stop_and_resume),
    "speed": Check(150, "at batch 32 400 to 600 TFLOP/s, which are 890 to 1340 images/s", speed),
    "throughput": Check(60, "more than 1000 images/s by the best loader", throughput),
    "deepspeed_stages": Check(60, "losses as DDP's", deepspeed_stages),
}


def _seconds(work: Callable[[], object], times: int, device: torch.device) -> float:
    """Mean seconds of one call over ``times`` calls, after a few warm-up calls."""
    seconds(work, 3, device)
    return seconds(work, times, device) / times


def _gradients(config: Config, device: torch.device) -> tuple[float, list[torch.Tensor]]:
    """The loss of one fixed batch, and all gradients, on the CPU."""
    torch.manual_seed(0)
    step = place(build_step(config, TASKS), device, config.channels_last)
    torch.manual_seed(1)
    batch = {name: x.to(device) for name, x in random_batch(2, 64, 96, torch.device("cpu")).items()}
    share_valid_counts([batch], step.tasks)
    total, _ = step(batch)
    total.backward()
    return total.item(), [p.grad.cpu() for p in step.parameters() if p.grad is not None]


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """The norm of the difference, relative to the larger norm. 0 if both are noise."""
    scale = max(a.norm().item(), b.norm().item())
    return (a - b).norm().item() / scale if scale > 1e-4 else 0.0


def _batches(config: Config, device: torch.device) -> Iterator[Batch]:
    dataset = PreparedDataset(Path(config.data.root))
    split = dataset.split("train")
    augmentation = make_augmentation(config.data.augment, dataset.info, config.seed)
    return make_loader(
        config.data, split, TrainOrder(len(split), batch_size=config.batch_size), device, augmentation
    ).batches()


def _first(config: Config, device: torch.device, count: int) -> list[Batch]:
    return list(islice(_batches(config, device), count))


def _differences(a: Batch, b: Batch) -> tuple[float, float, float]:
    """Largest differences in RGB levels, labels and depth."""
    rgb, label, depth = (
        (a[k].cpu().float() - b[k].cpu().float()).abs().max().item() for k in ("image", "segmentation", "depth")
    )
    return rgb, label, depth


def _against_pil(config: Config, device: torch.device) -> tuple[float, float, float]:
    """Largest differences between DALI's first batches and those of the reference, which decodes with PIL."""
    dataset = PreparedDataset(Path(config.data.root))
    split = dataset.split("val")
    order = EvalOrder(len(split), batch_size=config.batch_size)
    reference = load_config(
        None, [f"run_dir={config.run_dir}", f"data.root={config.data.root}", "data.loader=torch", "data.threads=1"]
    )
    ours, theirs = (
        make_loader(config.data, split, order, device),
        make_loader(reference.data, split, order, torch.device("cpu")),
    )
    found = [_differences(a, b) for a, b in zip(ours.batches(), theirs.batches(), strict=True)]
    rgb, label, depth = (max(values) for values in zip(*found, strict=True))
    return rgb, label, depth
