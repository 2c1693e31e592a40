"""What a training step does on a GPU, on fake CUDA tensors: shapes, types and devices, without a GPU.

python steps.py GUARD.so PRECISION. It covers augmentation, putting a batch together, valid counts, forward, losses,
clipping, the fused optimiser and the metrics, for every model. It cannot run backward: gradients are made up.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import numpy as np
import torch
import torch.amp.autocast_mode
import torch.cuda.amp.common
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

ctypes.CDLL(sys.argv[1])
torch.amp.autocast_mode.amp_definitely_not_available = lambda: False
torch.cuda.amp.common.amp_definitely_not_available = lambda: False
torch.cuda.is_bf16_supported = lambda *args, **kwargs: True  # type: ignore[assignment]

from mtunet_dist import plugins  # noqa: E402
from mtunet_dist.config import load_config  # noqa: E402
from mtunet_dist.core import optim  # noqa: E402
from mtunet_dist.core.step import Batch, MultiTaskStep, build_step, place, share_valid_counts  # noqa: E402
from mtunet_dist.data.augmentation import Augmentation  # noqa: E402
from mtunet_dist.data.batch import Pixels, as_batch, draws_of, factors_of  # noqa: E402
from mtunet_dist.data.order import Plan  # noqa: E402
from mtunet_dist.data.sending import send  # noqa: E402
from mtunet_dist.data.torch_augmentation import augmented  # noqa: E402
from mtunet_dist.tasks.depth import Depth  # noqa: E402
from mtunet_dist.tasks.normals import Normals  # noqa: E402
from mtunet_dist.tasks.segmentation import ClassInfo, Segmentation  # noqa: E402

CUDA = torch.device("cuda", 0)
HEIGHT, WIDTH, BATCH = 64, 96, 4
TASKS = {
    "segmentation": Segmentation("segmentation", tuple(ClassInfo(f"c{i}", (i, i, i)) for i in range(13))),
    "depth": Depth.metric_depth(0.001),
    "normals": Normals("normals"),
}
pinned: set[int] = set()
copies: list[str] = []
kept: list[Tensor] = []  # so that no id is used twice


def pin_memory(self: Tensor) -> Tensor:
    pinned.add(id(self))
    kept.append(self)
    return self


def to(self: Tensor, *args: Any, original: Any = Tensor.to, **kwargs: Any) -> Tensor:
    if self.device.type == "cpu" and args and torch.device("cuda", 0) == args[0]:
        assert id(self) in pinned, f"{tuple(self.shape)} is copied from memory that is not pinned: the host waits"
        copies.append(str(tuple(self.shape)))
    result: Tensor = original(self, *args, **kwargs)
    return result


def batch_on_device() -> Batch:
    """As ``CachedLoader`` makes it, with every augmentation."""
    augmentation = Augmentation(
        HEIGHT,
        WIDTH,
        flip=True,
        scales=(1.0, 1.5),
        brightness=0.2,
        contrast=0.2,
        saturation=0.2,
        hue=0.1,
        seed=0,
    )
    plan = Plan(0, np.arange(BATCH))
    draws = draws_of(plan, augmentation)
    assert len({(d.height, d.flip) for d in draws}) > 1
    pixels = Pixels(
        torch.empty(BATCH, HEIGHT, WIDTH, 3, dtype=torch.uint8, device=CUDA),
        {
            "segmentation": torch.empty(BATCH, HEIGHT, WIDTH, dtype=torch.uint8, device=CUDA),
            "depth": torch.empty(BATCH, HEIGHT, WIDTH, dtype=torch.int16, device=CUDA),
            "normals": torch.empty(BATCH, HEIGHT, WIDTH, 3, dtype=torch.int16, device=CUDA),
        },
    )
    copies.clear()
    factors = {name: send(x, CUDA) for name, x in factors_of(TASKS, draws, BATCH).items()}
    return as_batch(*augmented(pixels, TASKS, draws), factors, send(plan.samples, CUDA))


def on_cuda(step: MultiTaskStep) -> None:
    for module in step.modules():
        for held, make in ((module._parameters, nn.Parameter), (module._buffers, lambda tensor: tensor)):
            for name, t in held.items():
                if t is not None:
                    held[name] = make(torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=CUDA))


def run(model: str, precision: str) -> None:
    widths = "[8,16,32,64]" if "unet" in model else "[8,16,32,64,64]"
    words = [f"precision={precision}", f"model.name={model}", f"model.widths={widths}", "weighting.name=uncertainty"]
    config = load_config(None, ["run_dir=r", "data.root=d", *words])
    step = place(build_step(config, list(TASKS.values())), torch.device("cpu"), True)
    with FakeTensorMode(allow_non_fake_inputs=False):
        on_cuda(step)
        optimizer = optim.build_optimizer(step, config.optim)
        batch = batch_on_device()
        assert len(copies) <= 17, copies  # each is a call of the host
        share_valid_counts([batch], step.tasks)
        total, losses = step(batch)
        assert total.device == CUDA and total.dtype == torch.float32
        assert all(loss.device == CUDA and loss.dtype == torch.float32 for loss in losses.values())
        for parameter in step.parameters():
            parameter.grad = torch.empty_like(parameter)
        norm = nn.utils.get_total_norm([p.grad for p in step.parameters() if p.grad is not None])
        nn.utils.clip_grads_with_norm_(step.parameters(), 1.0, norm)
        optimizer.step()
        step.eval()
        outputs = step.predict(batch["image"])
        for task in step.tasks:
            task.metric(CUDA).update(outputs[task.name], batch[task.name])
            assert outputs[task.name].device == CUDA and outputs[task.name].dtype == torch.float32


if __name__ == "__main__":
    Tensor.pin_memory = pin_memory  # type: ignore[method-assign, assignment]
    Tensor.is_pinned = lambda self, *args: id(self) in pinned  # type: ignore[method-assign, assignment]
    Tensor.to = to  # type: ignore[method-assign, assignment]
    for name in plugins.available("model"):
        run(name, sys.argv[2])
        print(name, "fine")
