"""Every model, narrow, learns eight street scenes by heart, which a model that is wired wrongly does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mtunet_dist import plugins
from mtunet_dist.core.step import Batch, MultiTaskStep
from mtunet_dist.data.order import EvalOrder
from mtunet_dist.data.prepared import PreparedDataset
from mtunet_dist.data.torch_loader import TorchLoader
from mtunet_dist.prepare import prepare
from mtunet_dist.synthesize import synthesize
from mtunet_dist.synthetic.tree import Settings
from mtunet_dist.tasks.segmentation import VOID
from mtunet_dist.weightings.fixed import FixedWeighting

NAMES = ["segmentation", "depth"]
STEPS, LOOK_EVERY = 160, 20


@pytest.fixture(scope="module")
def streets(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    folder = tmp_path_factory.mktemp("streets")
    synthesize(folder / "source", Settings(train=8, val=0, test=0, height=64, width=128))
    return prepare("cityscapes", folder / "source", Path(folder / "prepared"), height=32, width=64, rgb_format="png")


def settings(name: str) -> tuple[float, dict[str, object]]:
    """Learning rate at the start, and options."""
    if name in ("mtunet", "st_unet"):
        return 2e-2, {"widths": (8, 12, 16, 24), "bottleneck": 24, "dropout": 0.0}
    return 7e-3, {"widths": (16, 24, 24, 24, 24)}


def errors(step: MultiTaskStep, batch: Batch) -> tuple[float, float]:
    """Share of labelled pixels that are right, and mean error of depth, both as the evaluation sees them."""
    step.eval()
    with torch.no_grad():
        outputs = step.predict(batch["image"])
    step.train()
    label, depth = batch["segmentation"], batch["depth"]
    right = (outputs["segmentation"].argmax(1) == label)[label != VOID]
    return right.float().mean().item(), (outputs["depth"] - depth)[depth > 0].abs().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("name", plugins.available("model"))
def test_eight_scenes_are_learned_by_heart(name: str, streets: PreparedDataset) -> None:
    torch.manual_seed(0)
    batch = next(TorchLoader(streets.split("train"), EvalOrder(8, batch_size=8), torch.device("cpu")).batches())
    known = batch["depth"][batch["depth"] > 0]
    by_a_constant = (known - known.median()).abs().mean().item()
    tasks = streets.info.tasks(NAMES)
    lr, options = settings(name)
    model = plugins.find("model", name)({task.name: task.channels for task in tasks}, **options)
    step = MultiTaskStep(model, tasks, FixedWeighting(NAMES, weights=(1.0, 0.05)))  # metres are large numbers
    step.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(step.parameters())
    accuracy, depth_error = errors(step, batch)
    assert accuracy < 0.5
    for i in range(STEPS):
        optimizer.param_groups[0]["lr"] = lr * (1 - i / STEPS)
        optimizer.zero_grad()
        step(batch)[0].backward()
        optimizer.step()
        if (i + 1) % LOOK_EVERY == 0:
            accuracy, depth_error = errors(step, batch)
            if accuracy > 0.9 and depth_error < by_a_constant / 2:
                break
    assert accuracy > 0.9, i
    assert depth_error < by_a_constant / 2, i
