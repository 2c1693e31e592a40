"""The losses of the paper (equations 2 and 3), masked to the labelled pixels.

Each returns ``(sum, count)`` over the valid pixels, so that the caller can divide by a count shared over ranks.
Invalid pixels are replaced before the arithmetic: selecting them by a boolean index would make the device wait, and
masking the result would let an inf or NaN there reach the gradient as 0 * NaN.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mtunet_dist.schema import VOID


def segmentation_loss(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy (equation 3) of logits (N, C, H, W) and label uint8 (N, H, W) with VOID where there is none.

    Returns the sum in nats (float32) and the number (int64) of labelled pixels.
    """
    valid = label != VOID
    logits = torch.where(valid[:, None], logits.float(), 0.0)
    # The sum of reduction="sum" uses atomics on CUDA, so it is neither reproducible nor pairwise.
    losses = F.cross_entropy(logits, label.long(), ignore_index=VOID, reduction="none")
    return losses.sum(), valid.sum()


def depth_loss(prediction: Tensor, depth: Tensor) -> tuple[Tensor, Tensor]:
    """L1 distance (equation 2) of prediction and depth, both (N, 1, H, W); depth is valid where positive and finite.

    Returns the sum in the unit of depth (float32) and the number (int64) of valid pixels.
    """
    assert prediction.shape == depth.shape, (prediction.shape, depth.shape)
    valid = (depth > 0) & depth.isfinite()
    difference = torch.where(valid, prediction.float(), 0.0) - torch.where(valid, depth.float(), 0.0)
    return difference.abs().sum(), valid.sum()


def masked_mean(total: Tensor, count: Tensor) -> Tensor:
    """``total / count``, and 0 with a zero gradient where nothing was valid."""
    return total / count.clamp(min=1)
