"""What a checkpoint can do without being shown: tasks of lm-evaluation-harness, and the paper's columns.

The paper (arXiv 2410.23168, table 1) calls all its columns but perplexity `acc`.  Its rows of Pythia-410M and
larger are those of the Mamba paper (arXiv 2312.00752, table 3), whose appendix E.2 says that HellaSwag and
ARC-C are accuracies normalised by length, and the others are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from megatron_tokenformer.config.schema import Precision
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.evaluation.load import Stored, load_model, one_device
from megatron_tokenformer.evaluation.scoring import Deadline, Scorer
from megatron_tokenformer.evaluation.sharing import RankPool, in_words_of

if TYPE_CHECKING:  # importing it takes DeepSpeed and megatron-core, which one process does without
    from megatron_tokenformer.data.tokenizers import Tokenizer
    from megatron_tokenformer.parallel.layout import Layout

Tasks = dict[str, Any]
"""of the harness: tasks, groups, and what is in which"""
COLUMNS = {
    "LAMBADA ppl": "lambada_openai/perplexity",
    "LAMBADA acc": "lambada_openai/acc",
    "HellaSwag": "hellaswag/acc_norm",
    "PIQA": "piqa/acc",
    "ARC-E": "arc_easy/acc",
    "ARC-C": "arc_challenge/acc_norm",
    "WinoGrande": "winogrande/acc",
}
"""the paper's, and where their figures are"""
AVERAGED = tuple(COLUMNS)[1:]


@dataclass(frozen=True)
class TaskSettings:
    """Tasks, and how they are to be run."""

    tasks: tuple[str, ...]
    include_path: str | None = None
    """a folder of more tasks"""
    num_fewshot: int | None = None
    limit: int | None = None
    """documents of each task; None: all"""
    sequence_length: int | None = None
    """tokens of context; None: as in training"""
    rows: int | None = None
    """of a batch; None: as many as fit"""
    bootstrap: int = 0
    """draws for the standard error of metrics that have no formula for it; 0: no errors at all"""

    def __post_init__(self) -> None:
        need_harness()
        for name in ("limit", "sequence_length", "rows", "num_fewshot"):
            value, least = getattr(self, name), 0 if name == "num_fewshot" else 1
            if value is not None and value < least:
                option = {"rows": "batch-size"}.get(name, name.replace("_", "-"))
                raise UserError(f"--{option} {value} is too small; it must be at least {least}")


def need_harness() -> None:
    """Refuse to go on without lm-evaluation-harness.

    Raises:
        UserError: it is not installed; says how to.
    """
    if find_spec("lm_eval") is None:
        raise UserError(
            "tasks need lm-evaluation-harness, which is not installed: "
            "pip install 'megatron-tokenformer[eval]'"
        )


def open_tasks(
    settings: TaskSettings,
    layout: Layout | None = None,
    convert: Callable[[Exception], UserError] | None = None,
) -> Tasks | None:
    """The tasks with their documents, on the main rank, which alone reads them; None on the others.

    Args:
        layout: of the processes that will share the work out; None: one alone.
        convert: makes words of whatever goes wrong; by default a bug stays a bug.

    Raises:
        UserError: tasks, or their documents, are not there; on every rank.
    """

    def act() -> Tasks:
        with in_words_of(convert):
            from megatron_tokenformer.evaluation.harness import load_tasks

            return load_tasks(settings.tasks, settings.include_path, settings.num_fewshot)

    if layout is None:
        return act()
    from megatron_tokenformer.parallel.layout import on_main_rank

    return on_main_rank(act)


def evaluate_tasks(
    stored: Stored,
    tokenizer: Tokenizer,
    settings: TaskSettings,
    tasks: Tasks | None,
    precision: Precision = "auto",
    layout: Layout | None = None,
    deadline: Deadline | None = None,
    convert: Callable[[Exception], UserError] | None = None,
) -> dict[str, Any] | None:
    """The harness's results, on the main rank; None on the others.

    Args:
        tasks: as `open_tasks` gave them to this rank.
        layout: of the processes that share the work out, each with the whole model; None: one alone.
        deadline: when to give up; None: never.
        convert: makes words of whatever goes wrong; by default a bug stays a bug.

    Raises:
        UserError: tasks that do not suit the model, a damaged checkpoint, too little memory.
    """
    rank, size = (layout.rank, layout.processes.world_size) if layout else (0, 1)
    device = layout.device if layout else one_device()

    def load() -> Scorer:
        try:
            model = load_model(stored.path, stored.manifest, precision, device)
        except torch.OutOfMemoryError:
            raise UserError("the whole model does not fit into the device's memory", exit_code=1) from None
        return Scorer(model, tokenizer, settings.rows, deadline, shows=rank == 0)

    if size == 1:
        scorer = load()
    else:
        from megatron_tokenformer.parallel.layout import each_rank

        scorer = each_rank(load)
    pool = RankPool(scorer, rank, size, convert)
    return pool.run(lambda: _evaluate_on_main_rank(pool, stored, settings, tasks))


def _evaluate_on_main_rank(
    pool: RankPool, stored: Stored, settings: TaskSettings, tasks: Tasks | None
) -> dict[str, Any]:
    from megatron_tokenformer.evaluation.harness import HarnessModel, run_tasks

    assert tasks is not None  # on the main rank
    model = HarnessModel(pool, settings.sequence_length or stored.config.data.sequence_length)
    return run_tasks(tasks, model, settings.limit, settings.bootstrap)


def figures(results: Mapping[str, Any]) -> dict[str, float]:
    """All figures of all tasks, by `task/metric`; of other filters than none, by `task/metric/filter`."""
    found = {}
    for task, row in results["results"].items():
        for key, value in row.items():
            metric, _, part = key.partition(",")
            if part and isinstance(value, int | float):
                found[f"{task}/{metric}" + (f"/{part}" if part != "none" else "")] = float(value)
    return found


def paper_columns(found: Mapping[str, float]) -> dict[str, float | None]:
    """The paper's columns; None where a task was not run; accuracies in percent."""
    row: dict[str, float | None] = {}
    for column, key in COLUMNS.items():
        value = found.get(key)
        row[column] = value if value is None or column not in AVERAGED else 100.0 * value
    known = [value for column in AVERAGED if (value := row[column]) is not None]
    row["average"] = math.fsum(known) / len(known) if len(known) == len(AVERAGED) else None
    return row
