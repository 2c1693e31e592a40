"""The DALI pipeline: encoded bytes from shards in our order are decoded and augmented, on a GPU if there is one.

DALI's readers and shuffles are not used. An external source gives DALI the bytes of each planned batch and the numbers
of its augmentation. Therefore we control order and randomness, and a resume needs only a batch number. Samples that
stay in their source are decoded by our own threads, because each source converts labels and depth in its own way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.pytorch import DALIGenericIterator
from torch import Tensor

from mtunet_dist.config import DaliConfig
from mtunet_dist.core.step import Batch
from mtunet_dist.data.augmentation import Augmentation
from mtunet_dist.data.batch import as_batch, draws_of, factors_of
from mtunet_dist.data.broken import BrokenSamples, OnError, stand_ins
from mtunet_dist.data.order import Order, Plan
from mtunet_dist.data.sending import Loans
from mtunet_dist.data.splits import ShardSplit, Split
from mtunet_dist.errors import InputError
from mtunet_dist.sources._images import encode
from mtunet_dist.tasks._task import Task

Parts = dict[str, np.ndarray]
"""RGB and the targets of a sample: encoded, uint8 (n,), or pixels (H, W, C)."""
JPEG_BYTES_PER_PIXEL = 12  # nvJPEG's buffers: three planes of int16 coefficients and of pixels


class DaliLoader:
    """Batches from DALI. RGB decodes on the GPU (``mixed``) if ``device`` is a GPU and the shards hold JPEGs."""

    def __init__(
        self,
        split: Split,
        order: Order,
        device: torch.device,
        augmentation: Augmentation | None = None,
        *,
        threads: int = 2,
        prefetch: int = 2,
        on_error: OnError = "stop",
        settings: DaliConfig | None = None,
    ) -> None:
        self.split, self.order, self.device, self.augmentation = split, order, device, augmentation
        self.threads, self.prefetch, self.settings = threads, prefetch, settings or DaliConfig()
        self.broken = BrokenSamples(on_error)
        self.failure: InputError | None = None  # an error found while reading ahead; it is raised when its batch is due
        self.pool = None if isinstance(split, ShardSplit) else ThreadPoolExecutor(threads)
        self.ahead: dict[int, list[Future[Parts | InputError]]] = {}  # batches that the pool reads, by number
        # Whether a part is encoded when the pipeline gets it.
        self.encoded = (
            {"rgb": True, **split.encoded} if isinstance(split, ShardSplit) else dict.fromkeys(split.parts, False)
        )
        self.multiplied = [name for name, task in split.targets.items() if task.multiplied]
        factors = [f"factors/{name}" for name in self.multiplied]
        self.outputs = [*(f"part/{part}" for part in split.parts), *factors, "sample"]

    @property
    def skipped(self) -> int:
        """See ``Loader.skipped``."""
        return self.broken.skipped

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Batches ``start``, ``start`` + 1, ... of the order; see ``Loader.batches``."""
        if self.order.batches is not None and start >= self.order.batches:
            return
        index = start
        iterator = self._iterator(index)
        loans = Loans() if self.device.type == "cuda" else None
        while True:
            try:
                (out,) = next(iterator)
            except StopIteration:
                if self.failure is not None:
                    raise self.failure from None
                return
            except RuntimeError:
                # DALI's message does not name the sample. If no sample is broken, the error is DALI's own.
                samples = self.order.plan(index).samples
                iterator = None  # free its memory, which may be what is lacking
                if not (self.broken.search(self.split, samples) or self._search_alone(samples)):
                    raise
                # An iterator ends after an error. The new one puts a stand-in in place of the broken sample.
                iterator = self._iterator(index)
                continue
            if self.broken.positions:
                self.broken.count(self.order.plan(index).samples)
            outputs = {name: out.pop(name) for name in self.outputs}
            yield self._batch(outputs, copied=loans is not None)
            if loans is not None:
                loans.keep(*outputs.values())
            index += 1

    def _batch(self, outputs: dict[str, Tensor], *, copied: bool) -> Batch:
        """The batch from the outputs of the pipeline. ``copied``: they are views of DALI's memory, and the GPU may
        still be at an earlier step, so that nothing in the batch may be one of them."""
        factors = {name: outputs[f"factors/{name}"] for name in self.multiplied}
        targets = {name: outputs[f"part/{name}"] for name in self.split.targets}
        image, sample = outputs["part/rgb"], outputs["sample"]
        for name, task in self.split.targets.items():
            if task.PLANES == 1:
                targets[name] = targets[name].squeeze(3)
            if copied and name not in factors:  # a product is a copy
                targets[name] = targets[name].clone()
        if copied:
            image, sample = image.clone(), sample.clone()
        return as_batch(image, targets, factors, sample)

    def _search_alone(self, samples: np.ndarray) -> bool:
        """Put ``samples`` through DALI one by one. Note those that DALI refuses although PIL decodes them. Returns
        whether any.

        Returns False if DALI also refuses a black image, if it refuses all of several samples, or if DALI does not
        decode.
        """
        if self.pool is not None or not self._passes(int(samples[0]), black=True):
            return False
        refused = [i for i in samples.tolist() if i not in self.broken.positions and not self._passes(i)]
        if len(refused) == len(samples) > 1:  # a full GPU still takes the black image: the CPU decodes it
            return False
        for i in refused:
            reason = "DALI cannot decode it although PIL can; prepare it again, or use data.loader=torch"
            self.broken.add(i, f"{self.split.describe(i)}: {reason}")
        return bool(refused)

    def _passes(self, i: int, *, black: bool = False) -> bool:
        """Whether DALI accepts a batch of sample ``i`` alone, or of the black image that stands in for it."""
        alone = DaliLoader(self.split, _One(i), self.device, threads=1, prefetch=1, settings=self.settings)
        if black:
            alone.broken.positions.add(i)
        try:
            next(alone._iterator(0))
        except RuntimeError:
            return False
        return True

    def _iterator(self, start: int) -> Any:
        augmentation, info = self.augmentation, self.split.info
        self.ahead.clear()
        on_gpu = self.device.type == "cuda"
        pipeline = pipeline_def(_graph)(
            self._source(start),
            tasks=self.split.targets,
            multiplied=self.multiplied,
            size=(info.height, info.width),
            zooms=augmentation is not None and augmentation.zooms,
            colors=augmentation is not None and augmentation.colors,
            encoded=self.encoded,
            flips=augmentation is not None and augmentation.flip,
            on_gpu=on_gpu,
            mixed=_mixed_options(info.height, info.width, self.settings) if on_gpu else {},
            batch_size=len(self.order.plan(start).samples),
            num_threads=self.threads,
            device_id=self.device.index if on_gpu else None,
            set_affinity=on_gpu and self.settings.affinity,
            prefetch_queue_depth=self.prefetch,
        )
        pipeline.build()
        return DALIGenericIterator(pipeline, self.outputs, auto_reset=False, prepare_first_batch=False)

    def _source(self, start: int) -> Callable[[types.BatchInfo], list[list[np.ndarray]]]:
        """The function that DALI calls for each batch. It returns parts, factors, positions and augmentation."""
        augmentation, tasks = self.augmentation, self.split.targets

        def batch(info: types.BatchInfo) -> list[list[np.ndarray]]:
            index = start + info.iteration
            if self.order.batches is not None and index >= self.order.batches:
                raise StopIteration
            plan = self.order.plan(index)
            draws = draws_of(plan, augmentation)
            try:
                columns = self._parts(index, plan.samples)
            except InputError as error:
                self.failure = error
                raise StopIteration from None
            factors = factors_of(tasks, draws, len(plan.samples)).values()
            columns += [list(map(np.asarray, x)) for x in (*factors, plan.samples)]
            if augmentation is not None and augmentation.zooms:
                columns += [[np.array([d.top, d.left]) for d in draws], [np.array([d.height, d.width]) for d in draws]]
            if augmentation is not None and augmentation.colors:
                columns += [[np.array(d.color, dtype=np.float32).reshape(3, 4) for d in draws]]
            if augmentation is not None and augmentation.flip:
                columns += [[np.array(d.flip, dtype=np.int32) for d in draws]]
            return columns

        return batch

    def _parts(self, index: int, samples: np.ndarray) -> list[list[np.ndarray]]:
        """Images and targets of batch ``index``, encoded or not. Known broken samples get stand-ins."""
        parts: dict[int, Parts] = {}
        for i, found in zip(samples.tolist(), self._reads(index, samples), strict=True):
            if i in self.broken.positions:
                continue
            if isinstance(found, InputError):
                self.broken.add(i, str(found))
            else:
                parts[i] = found
        rows = []
        for i, shown in zip(samples.tolist(), stand_ins(samples, self.broken.positions).tolist(), strict=True):
            if i in parts:
                rows.append(parts[i])
            else:
                rows.append({**self._blank, **({} if shown == i else {"rgb": parts[shown]["rgb"]})})
        return [[row[part] for row in rows] for part in self.split.parts]

    @functools.cached_property
    def _blank(self) -> Parts:
        """A black image and blank targets, in the form that the pipeline takes."""
        height, width = self.split.info.height, self.split.info.width
        pixels = {"rgb": np.zeros((height, width, 3), dtype=np.uint8)}
        pixels |= {name: _planes(task.blank(height, width)) for name, task in self.split.targets.items()}
        return {part: _png(x) if self.encoded[part] else x for part, x in pixels.items()}

    def _reads(self, index: int, samples: np.ndarray) -> Iterable[Parts | InputError]:
        """The results of ``_read`` for the ``samples`` of batch ``index``.

        DALI calls this on the training thread. With a pool the batch has already been read, because the pool works
        batches ahead.
        """
        if self.pool is None:
            return map(self._read, samples.tolist())
        last = index + self.prefetch
        if self.order.batches is not None:
            last = min(last, self.order.batches - 1)
        for number in range(index, last + 1):
            if number not in self.ahead:
                self.ahead[number] = [self.pool.submit(self._read, i) for i in self.order.plan(number).samples.tolist()]
        return [future.result() for future in self.ahead.pop(index)]

    def _read(self, i: int) -> Parts | InputError:
        """The parts of sample ``i`` in the form that the pipeline takes, or the error of a damaged sample."""
        try:
            if not isinstance(self.split, ShardSplit):
                raw = self.split.decode(i)
                return {"rgb": raw.rgb, **{name: _planes(target) for name, target in raw.targets.items()}}
            found = self.split.stored(i)
            arrays = {
                name: _planes(self.split.array(name, found[name])) for name, x in self.split.encoded.items() if not x
            }
            return {**found, **arrays}
        except InputError as error:
            return error


class _One:
    """An order with a single batch: sample ``i``."""

    batches = 1

    def __init__(self, i: int) -> None:
        self.i = i

    def plan(self, index: int) -> Plan:
        """See ``Order.plan``."""
        assert index == 0
        return Plan(0, np.array([self.i]))


def _graph(
    source: Any,
    *,
    tasks: Mapping[str, Task],
    multiplied: Sequence[str],
    size: tuple[int, int],
    encoded: Mapping[str, bool],
    zooms: bool,
    colors: bool,
    flips: bool,
    on_gpu: bool,
    mixed: dict[str, Any],
) -> tuple[Any, ...]:
    others = len(multiplied) + 1  # the factors, and the positions
    count = 1 + len(tasks) + others + 2 * zooms + colors + flips
    # Decoders set their own layouts; other inputs need one.
    layouts = ["" if encoded[part] else "HWC" for part in ("rgb", *tasks)]
    layouts += [""] * (count - len(layouts))
    columns = fn.external_source(source=source, num_outputs=count, batch=True, batch_info=True, layout=layouts)
    image, rest = columns[0], list(columns[1 + len(tasks) : 1 + len(tasks) + others])
    targets, draws = dict(zip(tasks, columns[1:], strict=False)), list(columns[1 + len(tasks) + others :])
    if encoded["rgb"]:
        # prepare has turned the images upright, so no EXIF orientation is left. PNGs always decode on the CPU. JPEGs
        # decode on the GPU if there is one, with the same chroma upsampling as the CPU.
        image = fn.decoders.image(
            image,
            device="mixed" if on_gpu else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,
            **mixed,
        )
    for name, task in tasks.items():
        if encoded[name]:
            kinds = {"output_type": types.GRAY, "dtype": types.to_dali_type(np.dtype(task.DTYPE).name)}
            targets[name] = fn.decoders.image(targets[name], adjust_orientation=False, **kinds)
    if on_gpu:
        # Data that is already on the GPU is not copied.
        image, rest = image.gpu(), [x.gpu() for x in rest]
        targets = {name: x.gpu() for name, x in targets.items()}
    for name in multiplied:
        targets[name] = fn.cast(targets[name], dtype=types.FLOAT)
    if zooms:
        start, window, *draws = draws
        # Round only after the colours, which would magnify the rounding error.
        image = _zoomed(image, start, window, size, types.INTERP_LINEAR, types.FLOAT if colors else types.UINT8)
        for name, x in targets.items():
            kind = types.FLOAT if name in multiplied else types.to_dali_type(np.dtype(tasks[name].DTYPE).name)
            targets[name] = _zoomed(x, start, window, size, types.INTERP_NN, kind)
    if colors:
        color, *draws = draws
        image = fn.cast(fn.coord_transform(image, MT=color, dtype=types.FLOAT), dtype=types.UINT8)
    if flips:
        image = fn.flip(image, horizontal=draws[0])
        targets = {name: fn.flip(x, horizontal=draws[0]) for name, x in targets.items()}
    return image, *targets.values(), *rest


def _zoomed(x: Any, start: Any, window: Any, size: tuple[int, int], interpolation: Any, dtype: Any) -> Any:
    """Cut out the window, then resize. A resize with a region of interest would blend in pixels from around it."""
    cut = fn.slice(x, start, window, axes=(0, 1), normalized_anchor=False, normalized_shape=False)
    return fn.resize(cut, size=size, interp_type=interpolation, antialias=False, dtype=dtype)


def _mixed_options(height: int, width: int, settings: DaliConfig) -> dict[str, Any]:
    """Options of the decoder that exist only on a GPU. All images have the same size, so its buffers are allocated once
    to fit. The defaults, 32 MiB per thread, are for unknown sizes."""
    padding = JPEG_BYTES_PER_PIXEL * height * width
    return {
        "hw_decoder_load": settings.hw_decoder_load,
        "affine": settings.affinity,
        "device_memory_padding": padding,
        "host_memory_padding": padding,
        "preallocate_height_hint": height,
        "preallocate_width_hint": width,
    }


def _planes(target: np.ndarray) -> np.ndarray:
    """A stored target as (H, W, planes)."""
    return target[..., None] if target.ndim == 2 else target


def _png(pixels: np.ndarray) -> np.ndarray:
    """The bytes of a PNG, uint8 (n,)."""
    return np.frombuffer(encode(pixels.squeeze(), "PNG"), dtype=np.uint8)
