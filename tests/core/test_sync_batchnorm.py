"""Batch norm over all ranks is batch norm over the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from helpers.training import MakeConfig, assert_same_state, copy_as_of, final_state, on_two_ranks, train_each
from mtunet_dist import distributed
from mtunet_dist.core.sync_batchnorm import SyncBatchNorm2d, synchronise
from mtunet_dist.train import train

CPU = torch.device("cpu")
SHAPE = (4, 3, 5, 6)


def norm_of(x: Tensor, module: nn.Module) -> dict[str, Tensor]:
    """Output, gradients and statistics after one pass of a loss in which every output counts differently."""
    x = x.clone().requires_grad_()
    output = module(x)
    weights = torch.arange(output[0].numel(), dtype=x.dtype).view_as(output[0]).sin()
    (output.square() * weights).sum().backward()
    assert x.grad is not None
    gradients = {f"grad/{name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"output": output.detach(), "input grad": x.grad, **gradients, **dict(module.named_buffers())}


def module_of(dtype: torch.dtype) -> nn.BatchNorm2d:
    module = nn.BatchNorm2d(3).to(dtype)
    nn.init.normal_(module.weight)
    nn.init.normal_(module.bias)
    return module


def _share(folder: Path) -> None:
    rank = distributed.rank()
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(0)
        model = nn.Sequential(module_of(dtype))
        synchronise(model, CPU)
        assert type(model[0]) is SyncBatchNorm2d
        share = (torch.randn(SHAPE, dtype=dtype) * 3 + 2)[2 * rank : 2 * rank + 2]
        torch.save(norm_of(share, model[0]), folder / f"{rank}-{dtype}.pt")


def test_two_shares_are_normalised_as_the_whole(tmp_path: Path) -> None:
    on_two_ranks(_share, tmp_path)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        torch.manual_seed(0)
        module = module_of(dtype)
        whole = norm_of(torch.randn(SHAPE, dtype=dtype) * 3 + 2, module)
        shares = [torch.load(tmp_path / f"{rank}-{dtype}.pt") for rank in range(2)]
        for name, value in whole.items():
            if name in ("output", "input grad"):
                both = torch.cat([share[name] for share in shares])
            elif name.startswith("grad/"):
                both = shares[0][name] + shares[1][name]  # the strategy reduces these
            else:
                both = shares[0][name]
                assert torch.equal(both, shares[1][name])
            torch.testing.assert_close(both, value, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "deepspeed"])
def test_a_training_with_it_has_the_same_statistics_on_all_ranks_and_resumes(
    make_config: MakeConfig, tmp_path: Path, strategy: str
) -> None:
    words = ["sync_batchnorm=true", f"strategy.name={strategy}", "checkpoint.every_steps=2", "checkpoint.keep=9"]
    whole, again = (make_config(*words, f"run_dir={tmp_path / name}") for name in ("whole", "again"))
    on_two_ranks(train_each, [whole])
    first, second = (rank["local"] for rank in final_state(whole.run_dir)["ranks"])
    statistics = [name for name in first if "running_" in name]
    assert statistics
    assert all(torch.equal(first[name], second[name]) for name in statistics)
    copy_as_of(4, Path(whole.run_dir), Path(again.run_dir))
    on_two_ranks(train, again)
    assert_same_state(final_state(again.run_dir), final_state(whole.run_dir))
