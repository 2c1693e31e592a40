"""DeepSpeed: ZeRO stages 0 to 3, started by torchrun like every other training.

The optimiser, precision and checkpoints are ours (torch's optimiser, ``MultiTaskStep``'s autocast over float32 weights,
``Strategy.save``). DeepSpeed reduces the gradients, and partitions over ranks the optimiser's state (stage 1), the
gradients (2) and the weights (3).
"""

from __future__ import annotations

import copy
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtunet_dist import distributed
from mtunet_dist.config import Config
from mtunet_dist.core import optim
from mtunet_dist.core.step import Batch, MultiTaskStep, place
from mtunet_dist.errors import InputError, needs
from mtunet_dist.strategies._deepspeed_settings import settings
from mtunet_dist.strategies._loss_scale import LossScale


class DeepSpeedStrategy:
    """Gradients averaged, and training state partitioned, by DeepSpeed.

    Weights stay contiguous even with ``channels_last``, because DeepSpeed lays them out flat; images in
    channels-last memory make the activations channels-last all the same.

    Options:
        stage: 0 partitions nothing, 1 the optimiser's state over the ranks, 2 the gradients too, 3 the weights too.
        offload_optimizer: keep the optimiser's state, and update, on the CPU (stages 1 to 3).
        config_file: a JSON file of further DeepSpeed settings; what follows from the config must not differ there.
    """

    def __init__(
        self,
        step: MultiTaskStep,
        config: Config,
        device: torch.device,
        *,
        stage: int = 1,
        offload_optimizer: bool = False,
        config_file: str = "",
    ) -> None:
        given = settings(
            config,
            distributed.world_size(),
            stage=stage,
            offload_optimizer=offload_optimizer,
            config_file=config_file,
        )
        self.deepspeed = _import_deepspeed(device)
        self.device, self.channels_last, self.stage = device, config.channels_last, stage
        self.unpartitioned = copy.deepcopy(step).cpu() if stage == 3 else None  # on the device only in ``whole``
        self.module = place(step, device, channels_last=False)
        self.optimizer = optim.build_optimizer(self.module, config.optim)
        self.scale = LossScale(enabled=config.precision == "fp16")
        self.own_group = _ensure_group(device)
        try:
            # ``zero`` is DeepSpeed's optimiser around ours. At stage 0 it is ours itself.
            self.engine, self.zero, _, _ = self.deepspeed.initialize(
                model=self.module, optimizer=self.optimizer, config=given, dist_init_required=False
            )
        except (ValueError, self.deepspeed.DeepSpeedConfigError) as error:  # ValueError is pydantic's
            self.close()
            if not config_file:
                raise
            raise InputError(f"strategy.config_file={config_file}: {' '.join(str(error).split())}") from None

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        result: tuple[Tensor, dict[str, Tensor]] = self.engine(batch)
        return result

    def accumulate(self, *, last: bool) -> AbstractContextManager[Any]:
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        # The loop has already divided by the number of micro-batches.
        if self.stage == 0:
            self.engine.backward(self.scale.value * loss if self.scale.enabled else loss, scale_wrt_gas=False)
            return
        if self.scale.enabled:
            self.zero.override_loss_scale(self.scale.value)
        self.engine.backward(loss, scale_wrt_gas=False)

    def apply(self, lr: float) -> Tensor:
        optim.set_lr(self.optimizer, lr)
        if self.stage == 0:
            return self._apply_unpartitioned()
        self.engine.step()
        self.scale.update(overflow=self.zero.overflow)
        return torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32, device=self.device)

    def _apply_unpartitioned(self) -> Tensor:
        """``apply`` at stage 0, where DeepSpeed does not return the norm and does not scale the loss of float32
        weights."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        if self.scale.enabled:
            torch._foreach_mul_(gradients, 1 / self.scale.value)
        norm = nn.utils.get_total_norm(gradients)
        overflow = self.scale.enabled and not norm.isfinite()
        if overflow:
            self.engine.zero_grad()
        else:
            self.engine.step()
        self.scale.update(overflow=overflow)
        return norm

    @property
    def loss_scale(self) -> float:
        return self.scale.value if self.scale.enabled else 1.0

    @contextmanager
    def full_weights(self) -> Iterator[MultiTaskStep]:
        if self.unpartitioned is None:
            yield self.module
            return
        module = place(self.unpartitioned, self.device, self.channels_last)
        parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
        with torch.no_grad():
            for name, value in self._weights():
                parameters[name].copy_(value)
            for name, buffer in self.module.named_buffers():
                buffers[name].copy_(buffer)
        yield module
        module.cpu()

    def save(self) -> dict[str, Any]:
        weights = {name: _copy(value) for name, value in self._weights() if distributed.is_main()}
        state = self._optimizer_state()
        if not distributed.is_main():
            return {}
        model = {name: weights.get(name, value) for name, value in self.module.state_dict().items()}
        return {"model": model, "optimizer": state, "scaler": self.scale.state_dict()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        if self.stage == 0:
            yield from optim.named_tensors(self.optimizer, self.module)
            return
        names = {parameter: name for name, parameter in self.module.named_parameters()}
        yield from (x for x in self.module.state_dict().items() if self.stage < 3 or x[0] not in names.values())
        for parameters, flat in self._partitions():
            slots = {"weights": flat, **self.optimizer.state.get(flat, {})}
            if self.stage < 3:
                whose = f"{names[parameters[0]]} to {names[parameters[-1]]}"
                yield from ((f"{slot} of {whose}", value) for slot, value in slots.items())
                continue
            begin = 0
            for parameter in parameters:
                part, own = _share(parameter)  # the padding after this rank's own part is uninitialised
                mine = slice(begin, begin + own)
                begin += len(part)
                yield names[parameter], part[:own]
                for slot, value in slots.items():
                    yield f"{slot} of {names[parameter]}", value.flatten()[mine] if value.ndim else value

    def load(self, state: dict[str, Any]) -> None:
        optim.check_names(self.module, state["optimizer"])
        if self.stage == 3:
            self._load_partitioned_weights(state["model"])
        else:
            self.module.load_state_dict(state["model"])
        if self.stage == 0:
            optim.load_named_state(self.optimizer, self.module, state["optimizer"])
        else:
            self._load_optimizer_state(state["optimizer"])
        self.scale.load_state_dict(state["scaler"])

    def close(self) -> None:
        if self.own_group:
            distributed.leave(self.deepspeed.comm.destroy_process_group)  # also clears DeepSpeed's own state
            self.own_group = False

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter by name. It is whole on every rank until the next one is asked for."""
        for name, parameter in self.module.named_parameters():
            whole = self.deepspeed.zero.GatheredParameters([parameter]) if self.stage == 3 else nullcontext()
            with whole:
                yield name, parameter.detach()

    def _load_partitioned_weights(self, model: dict[str, Tensor]) -> None:
        """Load the model's state dict into partitioned weights, and into the copies of the parts that the optimiser
        updates."""
        assert self.unpartitioned is not None
        self.unpartitioned.load_state_dict(model)  # refuses other names and shapes
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                with self.deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    if distributed.is_main():
                        parameter.copy_(model[name])
                self.deepspeed.utils.safe_set_local_fp32_param(parameter, _part(parameter, model[name]))
            buffers = {name: buffer for name, buffer in self.module.named_buffers() if name in model}
            for name, buffer in buffers.items():
                buffer.copy_(model[name])

    def _partitions(self) -> list[tuple[list[nn.Parameter], nn.Parameter]]:
        """Groups of parameters, each with this rank's part of it: the single flat tensor that the optimiser updates."""
        if self.stage == 3:
            return list(zip(self.zero.fp16_groups, self.zero.fp32_partitioned_groups_flat, strict=True))
        return list(zip(self.zero.bit16_groups, self.zero.single_partition_of_fp32_groups, strict=True))

    def _link(self) -> None:
        """Let DeepSpeed find the share of each parameter in the flat states. By default it finds those of one group
        only."""
        if self.stage < 3:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def _optimizer_state(self) -> optim.NamedState:
        """``optim.named_state`` on rank 0, gathered parameter by parameter."""
        if self.stage == 0:
            return optim.named_state(self.optimizer, self.module)
        self._link()
        names = {parameter: name for name, parameter in self.module.named_parameters()}
        found: optim.NamedState = {}
        for parameters, flat in self._partitions():
            slots = self.optimizer.state.get(flat, {})
            for parameter in parameters:
                state = found[names[parameter]] = {}
                for slot, value in slots.items():
                    if slot != "step":
                        value = self.deepspeed.utils.safe_get_full_optimizer_state(parameter, slot)
                    if distributed.is_main():
                        state[slot] = _copy(value)
        return {name: found[name] for name in names.values() if name in found}

    def _load_optimizer_state(self, state: optim.NamedState) -> None:
        if self.stage < 3:
            self.zero.refresh_fp32_params()
        names = {parameter: name for name, parameter in self.module.named_parameters()}
        for parameters, flat in self._partitions():
            # All parameters of a group have taken the same number of steps.
            self.optimizer.state[flat] = {
                slot: value.to(flat.device, copy=True) if slot == "step" else torch.zeros_like(flat.detach())
                for slot, value in state[names[parameters[0]]].items()
            }
        self._link()
        utils = self.deepspeed.utils
        for parameters, _ in self._partitions():
            for parameter in parameters:
                for slot, value in state[names[parameter]].items():
                    if slot == "step":
                        continue
                    if self.stage == 3:
                        utils.safe_set_local_optimizer_state(parameter, _part(parameter, value), slot)
                    else:
                        utils.safe_set_full_optimizer_state(parameter, value, slot)


def _copy(value: Tensor) -> Tensor:
    """A copy on the CPU. A view would take the whole flat buffer into the checkpoint."""
    return value.detach().to("cpu", copy=True)


def _share(parameter: Any) -> tuple[Tensor, int]:
    """This rank's flat part of a stage-3 parameter, and how many of its first numbers belong to the parameter."""
    size = parameter.ds_tensor.numel()
    return parameter.ds_tensor, min(max(parameter.ds_numel - distributed.rank() * size, 0), size)


def _part(parameter: Any, value: Tensor) -> Tensor:
    """This rank's flat share of the full ``value`` of a stage-3 parameter. The last share is padded with zeros."""
    size = parameter.ds_tensor.numel()
    share = value.flatten()[distributed.rank() * size :][:size]
    return nn.functional.pad(share, (0, size - share.numel()))


def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed for ``device``, quiet, without the shared-memory operator that takes a minute to compile at the start.

    The import is here because it reads from the environment which accelerator to use.
    """
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # it requires a rank, even without a launcher
    try:
        import deepspeed
    except ModuleNotFoundError as error:
        raise needs("strategy 'deepspeed'", error) from None

    deepspeed.utils.logger.setLevel(logging.ERROR)
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    # DeepSpeed uses old names of torch, and torch warns of them at every step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    return deepspeed


def _ensure_group(device: torch.device) -> bool:
    """Make sure that there is a process group: DeepSpeed needs one even for one process. Returns whether it was made
    here."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if distributed.is_on():
        return False
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    return True


PLUGIN = DeepSpeedStrategy
