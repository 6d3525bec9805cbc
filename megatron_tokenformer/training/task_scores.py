"""Tasks of lm-evaluation-harness inside a run: on the checkpoint that was just saved, by all its ranks.

Whatever the run's layout, each rank reads the whole model from the checkpoint, beside its own part of the one
that is trained, and does its share of the requests.  So the figures are those of tools/evaluate.py on that
checkpoint, and nothing of the run's own state is touched.  What goes wrong is told, and training goes on.
Only at the start is it refused: tasks and their documents are loaded before the first step, and never again.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_tokenformer.checkpoint.manifest import MANIFEST
from megatron_tokenformer.checkpoint.store import step_name
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.data.provenance import TokenizerRecord
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.evaluation.load import Stored, checkpoint_tokenizer, open_checkpoint, open_tokenizer
from megatron_tokenformer.evaluation.scoring import Deadline
from megatron_tokenformer.evaluation.sharing import in_short
from megatron_tokenformer.evaluation.zero_shot import (
    Tasks,
    TaskSettings,
    evaluate_tasks,
    figures,
    need_harness,
    open_tasks,
)
from megatron_tokenformer.parallel.layout import Layout, each_rank, from_main_rank

if TYPE_CHECKING:
    from megatron_tokenformer.training.run import Run

SHARE_OF_LIMIT = 0.8
"""of training.slow_timeout_minutes, after which an evaluation gives up before the watchdog ends the run"""


def prepare_tasks(config: RunConfig, made_with: TokenizerRecord | None, layout: Layout) -> Tasks | None:
    """The run's tasks with their documents, on the main rank; None on the others, or if there are none.

    Raises:
        UserError: see `check_tasks`; or there is no such task (2), or its documents cannot be had (1); on
            every rank.
    """
    if not config.evaluation.tasks:
        return None
    from_main_rank(lambda: check_tasks(config, made_with))
    return open_tasks(_settings(config), layout, _in_words)


def check_tasks(config: RunConfig, made_with: TokenizerRecord | None) -> None:
    """Refuse what no evaluation of the run could do, before anything is loaded.

    Raises:
        UserError: no harness, no folder of tasks, or no tokenizer.
    """
    wanted = config.evaluation
    need_harness()
    if wanted.include_path is not None and not Path(wanted.include_path).is_dir():
        raise UserError(f"evaluation.include_path={wanted.include_path} is no folder of tasks")
    try:
        open_tokenizer(config.data.tokenizer, config.model.vocab_size, made_with)
    except UserError as error:
        raise UserError(f"evaluation.tasks need the tokenizer: {error}", error.exit_code) from None


def score_tasks(run: Run) -> None:
    """Run the tasks on the checkpoint of this step, and log their figures; called on every rank."""
    minutes, step = run.config.training.slow_timeout_minutes, run.progress.step
    run.saver.wait()
    with run.watchdog.limit("the evaluation on tasks", minutes):
        deadline = Deadline.after(minutes * SHARE_OF_LIMIT) if minutes else None
        try:
            results = _evaluate(run, run.folder / step_name(step), deadline)
        except UserError as error:
            told = f"warning: the tasks were not evaluated at step {step}: {error}; training goes on"
            run.log.event({"step": step, "event": "tasks not evaluated", "why": str(error)}, told)
            return
        finally:
            if run.layout.device.type == "cuda":
                torch.cuda.empty_cache()
    if results is not None:
        run.log.scores({"step": step, "tokens": run.progress.tokens, **figures(results)})


def _evaluate(run: Run, path: Path, deadline: Deadline | None) -> dict[str, Any] | None:
    """The results, on the main rank.

    Raises:
        UserError: there are none; on every rank.
    """

    def find() -> Stored:
        if not (path / MANIFEST).is_file():
            raise UserError(f"there is no {path}")
        return open_checkpoint(path)

    stored = from_main_rank(find)
    tokenizer = each_rank(lambda: checkpoint_tokenizer(stored))
    how = run.engine.precision, run.layout, deadline, _in_words
    return evaluate_tasks(stored, tokenizer, _settings(run.config), run.tasks, *how)


def _settings(config: RunConfig) -> TaskSettings:
    wanted = config.evaluation
    return TaskSettings(tuple(wanted.tasks), wanted.include_path, wanted.num_fewshot, wanted.limit)


def _in_words(error: Exception) -> UserError:
    """Whatever the harness, or a task's own code, raises: a month's training is worth more."""
    return UserError(in_short(error), exit_code=1)
