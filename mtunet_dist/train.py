"""Train: ``python -m mtunet_dist.train CONFIG key=value...``, or the same after ``torchrun --nproc-per-node=N -m``.

The same command resumes a stopped run from its newest checkpoint. The result is the same as without the stop.
"""

from __future__ import annotations

import gc
import math
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager

import torch
from torch import Tensor

from mtunet_dist import distributed
from mtunet_dist.config import Config, load_config
from mtunet_dist.core import optim
from mtunet_dist.core.comparison import DELTA, delta_m, higher_is_better
from mtunet_dist.core.finite import count_broken, first_broken
from mtunet_dist.core.step import Batch, share_valid_counts
from mtunet_dist.errors import NonFiniteLossError, PreemptedError
from mtunet_dist.runs import pictures, resume
from mtunet_dist.runs.evaluation import evaluate
from mtunet_dist.runs.run import Run
from mtunet_dist.runs.tracking import StepReport, Tracker
from mtunet_dist.runs.watchdog import Watchdog
from mtunet_dist.system import arguments
from mtunet_dist.system.command import command
from mtunet_dist.system.preemption import StopRequest

INTERRUPTED = "Ctrl-C: stopping with a checkpoint, at the next report at the latest; once more ends it at once"
LEAST_LOSS_SCALE = 1e-3  # below this scale, gradients that overflow are not finite at any scale

OnEval = Callable[[int, dict[str, float]], None]


def train(config: Config, on_eval: OnEval | None = None) -> dict[str, float]:
    """Train as ``config`` says and return the metrics of the last evaluation.

    ``on_eval(step, metrics)`` is called on every rank after each evaluation. If that step has a checkpoint, its writing
    has begun by then. The training joins torchrun's process group or an existing one, or runs alone. Raises InputError
    if config, data or checkpoint are wrong, NonFiniteLossError if a loss or the state becomes NaN or infinite, and
    MTUNetError if the run folder cannot be written. After SIGTERM, SIGUSR1, SIGUSR2 or SIGINT to any rank it writes a
    checkpoint and raises PreemptedError within ``log.every_steps`` steps. A second SIGINT ends the process at once. A
    training without progress for ``timeout_s`` ends at once, see ``Watchdog``.
    """
    device = distributed.pick_device(config.device)
    with distributed.process_group(device, config.timeout_s):
        run = resume.start(config, device)
        watchdog = Watchdog(run.dir / "hang", config.timeout_s, compiles=config.compile)
        with watchdog, closing(run):
            if distributed.is_main():
                print(_summary(run), flush=True)
            if not run.finished:
                tracker = Tracker(
                    run.dir,
                    start_step=run.progress.step,
                    total_steps=run.total_steps,
                    steps_per_epoch=run.order.steps_per_epoch,
                    batch_size=config.batch_size,
                    shown=[task.full(metric) for task in run.module.tasks for metric in task.MAIN],
                    evaluation_due=run.evaluation_due,
                    on_write_error=config.on_write_error,
                )
                said = INTERRUPTED if distributed.is_main() else ""
                with closing(tracker), StopRequest(on_interrupt=said) as stop, _no_garbage_collection():
                    _loop(run, tracker, stop, watchdog, on_eval or _ignore)
                    distributed.on_main(tracker.check)
            return run.progress.metrics


def _loop(run: Run, tracker: Tracker, stop: StopRequest, watchdog: Watchdog, on_eval: OnEval) -> None:
    config, order, step, progress = run.config, run.order, run.module, run.progress
    batches = run.loader.batches(start=progress.step * order.accumulate)
    window: list[Tensor] = []  # losses and gradient norms of the steps since the last report, on the device

    step.train()
    if run.evaluation_due:  # the previous process was stopped before this evaluation
        _evaluate_and_save(run, tracker, watchdog, on_eval, save=True)
    while not run.finished:
        lr = optim.lr_at(progress.step, config.optim, order.steps_per_epoch, run.total_steps)
        window.append(_optimiser_step(run, batches, lr))
        progress.step += 1
        watchdog.beat()

        epoch, step_in_epoch = divmod(progress.step, order.steps_per_epoch)
        epoch_done, last = step_in_epoch == 0, progress.step == run.total_steps
        save = epoch_done and epoch % config.checkpoint.every_epochs == 0
        save |= config.checkpoint.every_steps > 0 and progress.step % config.checkpoint.every_steps == 0
        if epoch_done:
            step.weighting.end_epoch()
        stopping = False
        # The report comes before any evaluation or checkpoint, so that both see only finite values.
        hurried = stop.received == signal.SIGINT and distributed.world_size() == 1  # no other rank must agree
        if epoch_done or save or hurried or progress.step % config.log.every_steps == 0:
            report, stopping = _report(run, window, lr, stop, tracker)
            if run.lock is not None:
                run.lock.end_if_lost()  # before anything is written
            tracker.log_steps(progress.step, report)
            window.clear()
            gc.collect()

        with tracker.paused():
            _evaluate_and_save(run, tracker, watchdog, on_eval, save=save or last, stopping=stopping)
            watchdog.beat()
        if stopping and not run.finished:
            reason = f"{stop.received.name} received" if stop.received else "another process was asked to stop"
            raise PreemptedError(
                f"{reason}: stopped after step {progress.step}, which is saved; the same command goes on"
            )


def _optimiser_step(run: Run, batches: Iterator[Batch], lr: float) -> Tensor:
    """One update from ``accumulate`` micro-batches. Returns this rank's losses (tasks..., total), then the gradient
    norm."""
    accumulate = run.order.accumulate
    micro_batches = [next(batches) for _ in range(accumulate)]
    share_valid_counts(micro_batches, run.module.tasks)
    rows = []
    for i, batch in enumerate(micro_batches):
        with run.strategy.accumulate(last=i == accumulate - 1):
            total, losses = run.strategy(batch)
            run.strategy.backward(total / accumulate)
        rows.append(torch.stack([*losses.values(), total.detach()]))
    return torch.cat([torch.stack(rows).mean(0), run.strategy.apply(lr)[None]])


def _report(run: Run, window: list[Tensor], lr: float, stop: StopRequest, tracker: Tracker) -> tuple[StepReport, bool]:
    """Copy the figures of the last steps to the host in one transfer, as means over ranks. Also return whether any rank
    was asked to stop.

    Raises NonFiniteLossError on all ranks if a loss, a gradient norm or the training state is not finite; the message
    names the value and the steps. Raises MTUNetError on all ranks if the newest checkpoint or the tracker's files could
    not be written.
    """
    flags = window[0].new_tensor([stop.received is not None, run.writer.failed, tracker.error is not None])
    broken = count_broken(run.strategy.tensors(), run.device, distributed.world_size())  # some are sums over ranks
    total = distributed.all_reduce_sum(torch.cat([flags, broken[None], *window]).double()).cpu()
    asked, unsaved, unsaid, unsound = total[:4].tolist()
    steps = total[4:].view(len(window), -1) / distributed.world_size()
    if unsaved:
        resume.check_written(run)
    if unsaid:
        distributed.on_main(tracker.check)
    tasks = [task.name for task in run.module.tasks]
    names = [*(f"loss '{name}'" for name in [*tasks, "total"]), "gradient norm"]
    if run.config.precision == "fp16" and run.strategy.loss_scale >= LEAST_LOSS_SCALE:
        names.pop()  # it may overflow: the scaler then skips the step and lowers the scale
    for step, row in enumerate(steps.tolist(), start=run.progress.step - len(window) + 1):
        for name, value in zip(names, row, strict=False):
            if not math.isfinite(value):
                raise NonFiniteLossError(
                    f"the {name} became {value} at step {step} (epoch "
                    f"{(step - 1) // run.order.steps_per_epoch + 1}); checkpoints are from before. "
                    "A lower optim.lr, or optim.clip_norm=1, may help"
                )
    if unsound:
        found = distributed.all_gather_object(first_broken(run.strategy.tensors(), distributed.world_size()))
        what = next(filter(None, found), "the state")
        first, last = run.progress.step - len(window) + 1, run.progress.step
        raise NonFiniteLossError(
            f"{what} within the steps {first} to {last}, while the losses are finite; "
            "checkpoints are from before. A lower optim.lr, optim.clip_norm=1 or precision=fp32 may help"
        )
    losses = dict(zip([*tasks, "total"], steps[:, :-1].mean(0).tolist(), strict=True))
    weights = {name: weight.item() for name, weight in run.module.weighting.weights().items()}
    skipped = 0
    if run.config.data.on_error == "skip":
        skipped = int(distributed.all_reduce_sum(torch.tensor(run.loader.skipped, device=run.device)))
    report = StepReport(losses, weights, lr, grad_norm=steps[-1, -1].item(), skipped=skipped)
    return report, asked > 0


def _ignore(step: int, metrics: dict[str, float]) -> None:
    """The default for ``on_eval``: does nothing."""


def _evaluate_and_save(
    run: Run, tracker: Tracker, watchdog: Watchdog, on_eval: OnEval, *, save: bool, stopping: bool = False
) -> None:
    """Evaluate if that is due, save if asked to or if the model is the best so far, then tell ``on_eval``.

    A run that is ``stopping`` saves at once. Its evaluation is left to the process that resumes it, because a
    preempting scheduler kills processes that end slowly.
    """
    evaluated = run.evaluation_due and not stopping
    best = evaluated and _evaluate(run, tracker, watchdog)
    if save or best or stopping:
        tracker.flush()
        resume.save(run, best=best, wait=stopping or run.progress.step == run.total_steps)
    if evaluated:
        on_eval(run.progress.step, run.progress.metrics)


def _evaluate(run: Run, tracker: Tracker, watchdog: Watchdog) -> bool:
    """Evaluate, report and draw. Returns whether the model is the best so far."""
    distributed.average_statistics(run.module)
    with watchdog.evaluation(), run.strategy.full_weights() as module:
        module.eval()
        result = evaluate(module, run.eval_loader, run.device, on_batch=watchdog.beat)
        if reference := run.config.checkpoint.reference:
            result.metrics[DELTA] = delta_m(result.metrics, reference, list(reference))
        run.progress.metrics, run.progress.evaluated = result.metrics, run.progress.step
        tracker.evaluation(run.progress.step, result.metrics, result.class_iou)
        if run.picture_batch is not None:
            tracker.picture(run.progress.step, pictures.sheet(module, run.picture_batch))
        module.train()
    return _is_best(run, result.metrics)


def _is_best(run: Run, metrics: Mapping[str, float]) -> bool:
    """Whether the model with ``metrics`` is the best so far. If it is, its value becomes ``run.progress.best``."""
    name = run.config.checkpoint.best
    value = metrics[name]
    sign = 1 if higher_is_better(name) else -1
    sound = all(math.isfinite(metrics[f"loss/{task.name}"]) for task in run.module.tasks)
    if (
        not sound
        or not math.isfinite(value)
        or (run.progress.best is not None and sign * value <= sign * run.progress.best)
    ):
        return False
    run.progress.best = value
    return True


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """While entered, Python collects cyclic garbage only after reports, and searches only new objects.

    The automatic collection would now and then stop a step for a tenth of a second, on one rank after the other.
    """
    was_on = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()


def _summary(run: Run) -> str:
    state = f"resuming at step {run.progress.step}" if run.progress.step else "starting"
    if run.finished:
        state = "already finished"
    return (
        f"{run.config.model['name']}, {run.parameters / 1e6:.2f} M parameters, {run.config.precision}, "
        f"{distributed.world_size()} x {run.device.type}; {len(run.train_split)} samples, "
        f"{run.order.steps_per_epoch} steps per epoch, {run.config.epochs} epochs; {state}; run folder {run.dir}"
    )


@command
def main() -> None:
    """The command line."""
    parser = arguments.parser(
        "train", "Train, or resume a training. Every key is listed in mtunet_dist/config/schema.py."
    )
    parser.add_argument("config", type=arguments.path, metavar="CONFIG", help="a YAML file, as those in configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    arguments.add_device(parser)
    args = parser.parse_intermixed_args()
    train(load_config(args.config, arguments.overrides(args)))


if __name__ == "__main__":
    main()
