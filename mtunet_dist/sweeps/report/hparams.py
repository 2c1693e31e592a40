"""The trials in TensorBoard's HParams tab: ``tensorboard --logdir SWEEP_DIR/trials``.

The settings and the end of a trial are in event files of their own beside those of its training, which has its own
writer. The names of these files never change, so that a resumed trial replaces them. They sort before and after the
training's files, because TensorBoard reads a folder's files in the order of their names and never goes back.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo
from tensorboard.summary.writer.record_writer import RecordWriter

from mtunet_dist.sweeps.config import Sweep
from mtunet_dist.sweeps.folder import Trial
from mtunet_dist.sweeps.ranking import text
from mtunet_dist.sweeps.space import Dimension

START, END = "events.out.tfevents.0000000000.hparams", "events.out.tfevents.9999999999.hparams"
SHOWN = ("miou", "accuracy", "depth_abs", "depth_rel")  # shown beside the goals
BOOL, FLOAT, STRING = api_pb2.DATA_TYPE_BOOL, api_pb2.DATA_TYPE_FLOAT64, api_pb2.DATA_TYPE_STRING
STATUS = {"finished": api_pb2.STATUS_SUCCESS, "stopped": api_pb2.STATUS_SUCCESS, "failed": api_pb2.STATUS_FAILURE}


def write_hparams(trial: Trial, sweep: Sweep) -> None:
    """Write to the trial's tensorboard folder what it tries and, if it has finished, how it ended.

    Call it before the trial starts or continues, and when it has ended; any number of calls is fine. A goal that no
    training writes (delta_m) appears when the trial has ended, by epoch instead of by step.
    """
    folder = sweep.dir / "trials" / trial.id / "tensorboard"
    folder.mkdir(parents=True, exist_ok=True)
    dimensions = sweep.dimensions
    start = SessionStartInfo(start_time_secs=_start_time(folder))
    for key, value in trial.parameters.items():
        kind = _type(dimensions[key])
        if kind == FLOAT:
            start.hparams[key].number_value = value
        elif kind == BOOL:
            start.hparams[key].bool_value = value
        else:
            start.hparams[key].string_value = text(value)
    _write(
        folder / START,
        [
            _about(metadata.EXPERIMENT_TAG, HParamsPluginData(experiment=_experiment(sweep))),
            _about(metadata.SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=start)),
        ],
    )
    if trial.status == "unfinished":
        (folder / END).unlink(missing_ok=True)  # an earlier try had ended
        return
    end = SessionEndInfo(status=STATUS[trial.status], end_time_secs=time.time())
    events = [_about(metadata.SESSION_END_INFO_TAG, HParamsPluginData(session_end_info=end))]
    _write(folder / END, [*events, *_own_goals(trial, sweep)])


def _experiment(sweep: Sweep) -> api_pb2.Experiment:
    """The columns of the tab. They are the same for each trial, because TensorBoard takes those of any trial."""
    goals = [goal.name for goal in sweep.objective.goals]
    return api_pb2.Experiment(
        name=sweep.name,
        hparam_infos=[_column(key, dimension) for key, dimension in sweep.dimensions.items()],
        metric_infos=[
            api_pb2.MetricInfo(name=api_pb2.MetricName(tag=f"eval/{name}"), display_name=name)
            for name in dict.fromkeys([*goals, *SHOWN])
        ],
    )


def _column(key: str, dimension: Dimension) -> api_pb2.HParamInfo:
    kind = _type(dimension)
    info = api_pb2.HParamInfo(name=key, type=kind, differs=True)  # columns that do not differ are hidden
    if dimension.kind == "choice":
        info.domain_discrete.extend(map(text, dimension.values) if kind == STRING else dimension.values)
    else:
        info.domain_interval.min_value, info.domain_interval.max_value = dimension.values
    return info


def _type(dimension: Dimension) -> Any:
    """A type that can show all values of ``dimension``."""
    values = dimension.values
    if all(isinstance(value, bool) for value in values):
        return BOOL
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return FLOAT
    return STRING


def _own_goals(trial: Trial, sweep: Sweep) -> list[Event]:
    """The goals that are not metrics of an evaluation. TensorBoard would not know them otherwise."""
    events = []
    for evaluation in trial.evaluations:
        values = zip(sweep.objective.goals, sweep.objective.values(evaluation.metrics), strict=True)
        own = [
            Summary.Value(tag=f"eval/{goal.name}", simple_value=value)
            for goal, value in values
            if goal.name not in evaluation.metrics
        ]
        if own:
            events.append(Event(wall_time=time.time(), step=evaluation.epoch, summary=Summary(value=own)))
    return events


def _start_time(folder: Path) -> float:
    """The time when the trial first started: its parameters are written right before."""
    file = folder.parent / "trial.json"
    return file.stat().st_mtime if file.is_file() else time.time()


def _about(tag: str, content: HParamsPluginData) -> Event:
    value = Summary.Value(tag=tag, metadata=metadata.create_summary_metadata(content), tensor=metadata.NULL_TENSOR)
    return Event(wall_time=time.time(), summary=Summary(value=[value]))


def _write(path: Path, events: list[Event]) -> None:
    """Replace ``path`` in one step, because TensorBoard may be reading it."""
    temporary = path.with_name(f"hparams.{os.getpid()}.tmp")  # TensorBoard ignores this name
    with temporary.open("wb") as file:
        writer = RecordWriter(file)
        for event in [Event(wall_time=time.time(), file_version="brain.Event:2"), *events]:
            writer.write(event.SerializeToString())
    temporary.replace(path)
