"""Evaluate a run or a checkpoint on a split: ``python -m mtunet_dist.evaluate RUN_OR_CHECKPOINT [--split test]``.

A run folder means its ``best.pt``, else its newest checkpoint.

Works under torchrun too; the figures do not depend on the number of processes.
"""

from __future__ import annotations

import math
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mtunet_dist import distributed
from mtunet_dist.core.comparison import higher_is_better
from mtunet_dist.data.prepared import PreparedDataset
from mtunet_dist.errors import MTUNetError
from mtunet_dist.runs.baselines import ConstantPredictor
from mtunet_dist.runs.evaluation import Evaluation, eval_loader, evaluate
from mtunet_dist.runs.loading import check_same_meaning, load_run, load_step
from mtunet_dist.system import arguments
from mtunet_dist.system.command import command
from mtunet_dist.system.files import write_json

HEADINGS = {"trained": "trained", "constant": "best constant"}  # headings of the table, by key in the JSON


def table(title: str, columns: dict[str, Evaluation]) -> Table:
    """A table of metrics, one row each and one column per evaluation, then the IoU of each class."""
    # Text, because rich reads strings with [] or colons as markup.
    result = Table(title=Text(title), title_justify="left", title_style="bold")
    result.add_column("metric")
    for name in columns:
        result.add_column(name, justify="right")
    evaluations = list(columns.values())
    for key in evaluations[0].metrics:
        result.add_row(key, *(_cell(key, e.metrics.get(key, math.nan)) for e in evaluations))
    result.add_section()
    for name in evaluations[0].class_iou:
        result.add_row(Text(f"IoU {name}"), *(_cell("miou", e.class_iou.get(name, math.nan)) for e in evaluations))
    return result


def _cell(key: str, value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.2%}" if higher_is_better(key) else f"{value:.4f}"  # only shares are better when higher


@command
def main() -> None:
    """Print the table and write ``evaluation-SPLIT.json`` beside the checkpoints."""
    parser = arguments.parser("evaluate", __doc__.splitlines()[0])
    arguments.add_run(parser)
    parser.add_argument("--split", help="a split of the dataset, or several: train+val (default: the run's data.eval)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the run's config, as data.root=")
    arguments.add_device(parser)
    args = parser.parse_intermixed_args()
    state, config, file = load_run(args.path, arguments.overrides(args))
    device = distributed.pick_device(config.device)
    with distributed.process_group(device, config.timeout_s):
        dataset = PreparedDataset(Path(config.data.root))
        check_same_meaning(dataset.info, state, config.tasks)
        name = args.split or config.data.eval
        step = load_step(state, config, device)
        loader = eval_loader(config, dataset.split(name), device)
        results = {"trained": evaluate(step, loader, device)}
        if set(config.data.train.split("+")) <= dataset.info.splits.keys():  # datasets for tests may lack it
            constant = ConstantPredictor(step.tasks, dataset.split(config.data.train), config.data.on_error)
            results["constant"] = evaluate(constant, loader, device)
        main_rank = distributed.is_main()
        if main_rank:
            title = f"{file}, step {state['step']}, on {name} ({results['trained'].samples} samples)"
            Console().print(table(title, {HEADINGS[key]: result for key, result in results.items()}))
    if main_rank:
        what = {"checkpoint": str(file), "step": state["step"], "split": name}
        folder = file.parent.parent if file.parent.name == "checkpoints" else file.parent
        output = folder / f"evaluation-{name}.json"
        try:
            write_json(output, {**what, **{key: result.as_dict() for key, result in results.items()}}, indent=2)
        except OSError as error:
            raise MTUNetError(f"{output} cannot be written: {error.strerror}; the figures are those above") from error
        print(f"written to {output}")


if __name__ == "__main__":
    main()
