"""Hints for unknown config keys: which of our keys the user may have meant. Other programs use other names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from mtunet_dist.errors import nearest

# The last part of the unknown key, in small letters without _ and -, and the end of our key.
SYNONYMS = {
    "accumulation": "optim.accumulate",
    "accumulationsteps": "optim.accumulate",
    "accumulategradbatches": "optim.accumulate",
    "gradaccum": "optim.accumulate",
    "gradientaccumulationsteps": "optim.accumulate",
    "amp": "precision",
    "bf16": "precision",
    "dtype": "precision",
    "fp16": "precision",
    "mixedprecision": "precision",
    "arch": "model.name",
    "backbone": "model.name",
    "net": "model.name",
    "network": "model.name",
    "batch": "batch_size",
    "batches": "batch_size",
    "bs": "batch_size",
    "trainbatchsize": "batch_size",
    "valbatchsize": "eval_batch_size",
    "ckptdir": "run_dir",
    "expdir": "run_dir",
    "logdir": "run_dir",
    "out": "run_dir",
    "outdir": "run_dir",
    "output": "run_dir",
    "outputdir": "run_dir",
    "rundir": "run_dir",
    "savedir": "run_dir",
    "workdir": "run_dir",
    "clip": "optim.clip_norm",
    "clipgrad": "optim.clip_norm",
    "gradclip": "optim.clip_norm",
    "gradientclipval": "optim.clip_norm",
    "maxgradnorm": "optim.clip_norm",
    "decay": "optim.weight_decay",
    "l2": "optim.weight_decay",
    "wd": "optim.weight_decay",
    "datadir": "data.root",
    "datapath": "data.root",
    "dataroot": "data.root",
    "dataset": "data.root",
    "epoch": "epochs",
    "maxepochs": "epochs",
    "nepochs": "epochs",
    "numepochs": "epochs",
    "evalinterval": "eval_every_epochs",
    "learningrate": "lr",
    "loginterval": "log.every_steps",
    "lossweighting": "weighting.name",
    "loss": "weighting.name",
    "lrscheduler": "optim.schedule",
    "scheduler": "optim.schedule",
    "numworkers": "data.threads",
    "nworkers": "data.threads",
    "workers": "data.threads",
    "optimizer": "optim.name",
    "randomseed": "seed",
    "saveinterval": "checkpoint.every_epochs",
    "syncbn": "sync_batchnorm",
    "timeout": "timeout_s",
    "warmup": "optim.warmup_epochs",
    "zero": "strategy.name",
}
# Keys that the config does not have.
ELSEWHERE = {
    "gpus": "The number of processes is the launcher's: mtunet launch --nproc=N",
    "ngpus": "The number of processes is the launcher's: mtunet launch --nproc=N",
    "nproc": "The number of processes is the launcher's: mtunet launch --nproc=N",
    "nodes": "The number of nodes is the launcher's: mtunet launch --head HOST --nnodes N",
    "size": "Images have the size that they were prepared at: mtunet prepare --size",
    "imgsize": "Images have the size that they were prepared at: mtunet prepare --size",
    "imagesize": "Images have the size that they were prepared at: mtunet prepare --size",
    "resume": "The same command resumes what run_dir holds",
}


def hint(key: str, value: object, beside: Sequence[str], own: Sequence[str], more: Callable[[], Sequence[str]]) -> str:
    """Return `` Did you mean 'x'?`` for the unknown dotted ``key``, or an empty text.

    First choice: a key whose last part is the same or a synonym, first in the same section, then in all of ``own``,
    then in ``more``. Second choice: a key with a similar name, first in ``beside``, the keys of the same section
    (dotted as ``key`` is), then in all keys.
    """
    if isinstance(value, dict) and value:  # a section
        if word := nearest(key, sorted({known.rpartition(".")[0] for known in own})):
            return f" Did you mean '{word}'?"
        name, inner = next(iter(value.items()))
        return hint(f"{key}.{name}", inner, [], own, more)
    section, _, last = key.rpartition(".")
    plain = re.sub(r"[^a-z0-9]", "", last.lower())
    for names in (own, more()):
        for end in (last.lower(), SYNONYMS.get(plain)):
            found = [known for known in names if known == end or known.endswith(f".{end}")]
            if near := [known for known in found if known.rpartition(".")[0] == section] or found:
                return f" Did you mean {' or '.join(map(repr, near[:2]))}?"
    if plain in ELSEWHERE:
        return f" {ELSEWHERE[plain]}."
    for names in (beside, own, more()):
        by_last = {known.rpartition(".")[2]: known for known in reversed(names)}
        if word := nearest(last, list(by_last)):
            return f" Did you mean '{by_last[word]}'?"
    return ""
