"""What the loaders share: putting a batch together, and finding the sample that broke one."""

from __future__ import annotations

from torch import Tensor

from mtunet_dist.data.order import Plan
from mtunet_dist.data.prepared import PreparedSplit
from mtunet_dist.multitask import Batch


def as_batch(image: Tensor, label: Tensor, depth: Tensor, depth_scale: Tensor, sample: Tensor) -> Batch:
    """A batch from decoded tensors: image (N, H, W, 3) and label (N, H, W, 1) uint8, depth (N, H, W, 1) stored
    units as float32, and what multiplies each sample's depth (N,)."""
    return {
        "image": image.permute(0, 3, 1, 2),
        "segmentation": label.squeeze(3),
        "depth": depth.permute(0, 3, 1, 2) * depth_scale.view(-1, 1, 1, 1),
        "sample": sample,
    }


def name_broken_sample(split: PreparedSplit, plan: Plan) -> None:
    """After a batch failed to decode: decode its samples one by one; InputError names the first that cannot be."""
    for i in plan.samples:
        split.decode(int(i))
