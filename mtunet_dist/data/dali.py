"""The DALI pipeline: encoded bytes from shards in our order, decoded and augmented, on the GPU where there is one.

DALI's readers and their shuffles are not used: an external source hands over the bytes of each planned batch
together with the numbers of its augmentation, so order and randomness are ours and resume needs only a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.pytorch import DALIGenericIterator

from mtunet_dist.data.augmentation import Augmentation
from mtunet_dist.data.batch import as_batch, name_broken_sample
from mtunet_dist.data.order import Order
from mtunet_dist.data.prepared import PreparedSplit
from mtunet_dist.multitask import Batch


class DaliLoader:
    """Batches through DALI; RGB decodes on the GPU (``mixed``) when ``device`` is one and RGB is stored as JPEG."""

    def __init__(
        self,
        split: PreparedSplit,
        order: Order,
        device: torch.device,
        augmentation: Augmentation | None = None,
        *,
        threads: int = 2,
        prefetch: int = 2,
    ) -> None:
        self.split, self.order, self.device, self.augmentation = split, order, device, augmentation
        self.threads, self.prefetch = threads, prefetch

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Batches ``start``, ``start`` + 1, ... of the order; see ``Loader.batches``."""
        if self.order.batches is not None and start >= self.order.batches:
            return
        names = ["image", "label", "depth", "depth_scale", "sample"]
        iterator = DALIGenericIterator(self._pipeline(start), names, auto_reset=False, prepare_first_batch=False)
        index = start
        while True:
            try:
                (out,) = next(iterator)
            except StopIteration:
                return
            except RuntimeError:
                # DALI's message does not say which sample it was.
                name_broken_sample(self.split, self.order.plan(index))
                raise
            yield as_batch(*(out[name] for name in names))
            index += 1

    def _pipeline(self, start: int) -> Any:
        on_gpu = self.device.type == "cuda"
        pipeline = pipeline_def(_graph)(
            self._source(start),
            size=(self.split.info.height, self.split.info.width),
            zooms=self.augmentation is not None and self.augmentation.zooms,
            flips=self.augmentation is not None and self.augmentation.flip,
            on_gpu=on_gpu,
            batch_size=len(self.order.plan(start).samples),
            num_threads=self.threads,
            device_id=self.device.index if on_gpu else None,
            prefetch_queue_depth=self.prefetch,
        )
        pipeline.build()
        return pipeline

    def _source(self, start: int) -> Callable[[types.BatchInfo], list[list[np.ndarray]]]:
        """What DALI calls for each batch: encoded parts, depth scales, positions, and what the augmentation needs."""
        augmentation, scale = self.augmentation, self.split.info.depth.scale

        def batch(info: types.BatchInfo) -> list[list[np.ndarray]]:
            index = start + info.iteration
            if self.order.batches is not None and index >= self.order.batches:
                raise StopIteration
            plan = self.order.plan(index)
            parts = zip(*(self.split.parts(i) for i in plan.samples), strict=True)
            columns = [list(column) for column in parts]
            positions = [np.array(i, dtype=np.int64) for i in plan.samples]
            if augmentation is None:
                return [*columns, [np.array(scale, dtype=np.float32)] * len(positions), positions]
            draws = [augmentation.draw(plan.epoch, int(i)) for i in plan.samples]
            columns += [[np.array(scale * d.depth_factor, dtype=np.float32) for d in draws], positions]
            if augmentation.zooms:
                columns += [[np.array([d.top, d.left]) for d in draws], [np.array([d.height, d.width]) for d in draws]]
            if augmentation.flip:
                columns += [[np.array(d.flip, dtype=np.int32) for d in draws]]
            return columns

        return batch


def _graph(source: Any, *, size: tuple[int, int], zooms: bool, flips: bool, on_gpu: bool) -> tuple[Any, ...]:
    columns = fn.external_source(source=source, num_outputs=5 + 2 * zooms + flips, batch=True, batch_info=True)
    rgb, label, depth, depth_scale, position, *draws = columns
    # Stored orientation is the truth (no EXIF rotation). PNGs decode on the CPU only, JPEGs on the GPU where
    # there is one; its chroma upsampling is told to be the CPU's.
    image = fn.decoders.image(
        rgb,
        device="mixed" if on_gpu else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,
    )
    label = fn.decoders.image(label, output_type=types.GRAY, adjust_orientation=False)
    depth = fn.decoders.image(depth, output_type=types.GRAY, dtype=types.UINT16, adjust_orientation=False)
    if on_gpu:
        label, depth, depth_scale, position = label.gpu(), depth.gpu(), depth_scale.gpu(), position.gpu()
    depth = fn.cast(depth, dtype=types.FLOAT)
    if zooms:
        start, window, *draws = draws
        image = _zoomed(image, start, window, size, types.INTERP_LINEAR)
        label = _zoomed(label, start, window, size, types.INTERP_NN)
        depth = _zoomed(depth, start, window, size, types.INTERP_NN)
    if flips:
        image, label, depth = (fn.flip(x, horizontal=draws[0]) for x in (image, label, depth))
    return image, label, depth, depth_scale, position


def _zoomed(x: Any, start: Any, window: Any, size: tuple[int, int], interpolation: Any) -> Any:
    """Cut out the window, then resize: a resize with a region of interest would blend in pixels around it."""
    cut = fn.slice(x, start, window, axes=(0, 1), normalized_anchor=False, normalized_shape=False)
    return fn.resize(cut, size=size, interp_type=interpolation, antialias=False)
