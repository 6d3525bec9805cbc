"""What follows from a step whose numbers have gone wrong: the run goes on, goes back, or ends."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.distributed as dist

from megatron_tokenformer.checkpoint import engine_state, store
from megatron_tokenformer.checkpoint.manifest import Manifest
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.parallel.layout import from_main_rank
from megatron_tokenformer.parallel.placement import ranges, spans
from megatron_tokenformer.training.health import Verdict
from megatron_tokenformer.training.run import Run, checkpoint_check

NAMES = {"loss": "the loss is not finite", "gradient": "the gradient is not finite"}


def settle(run: Run) -> bool:
    """Act on the gate's verdict on the step that was just counted.

    Returns:
        Whether the run went back to a checkpoint, so that its data begin at another position.

    Raises:
        UserError: the policy is to stop, or there were too many setbacks.
    """
    verdict, progress, training = run.gate.verdict, run.progress, run.config.training
    if verdict.loss is not None:
        progress.recent_losses = [*progress.recent_losses, verdict.loss][-training.spike_window :]
    progress.skipped += not verdict.changed
    if verdict.cause is None:
        # A step that the search for the loss scale of fp16 took is neither a setback nor the end of some.
        progress.skipped_in_a_row = 0 if verdict.changed else progress.skipped_in_a_row
        return False
    progress.skipped_in_a_row = 0 if verdict.changed else progress.skipped_in_a_row + 1
    restored = _restore_point(run) if verdict.cause == "spike" and training.on_spike == "rollback" else None
    action = _action(run, verdict, restored)
    row = {"step": progress.step, "event": verdict.cause, "action": action, **_where(run, verdict)}
    why = _told(run, verdict, row)
    if action == "stop":
        run.log.event(row, f"warning: {why}; the run ends")
        raise UserError(f"{why}; {_reason(run, verdict)}", exit_code=1, everywhere=True)
    if restored is None:
        run.log.event(row, f"warning: {why}; {_done(run, action)}")
        return False
    _go_back(run, restored, row, why)
    return True


def _action(run: Run, verdict: Verdict, restored: Any) -> str:
    training, progress = run.config.training, run.progress
    if progress.skipped_in_a_row >= training.max_skipped_steps:
        return "stop"
    if verdict.cause != "spike":
        return training.on_nonfinite
    if training.on_spike == "rollback":
        if progress.rollbacks >= training.max_rollbacks:
            return "stop"
        return "rollback" if restored else "skip"
    return training.on_spike


def _reason(run: Run, verdict: Verdict) -> str:
    """Why the run ends, and what to do."""
    training, progress = run.config.training, run.progress
    if progress.skipped_in_a_row >= training.max_skipped_steps:
        return (
            f"{progress.skipped_in_a_row} steps in a row have changed nothing "
            f"(training.max_skipped_steps={training.max_skipped_steps})"
        )
    if verdict.cause == "spike":
        return (
            f"the run has gone back {progress.rollbacks} times already "
            f"(training.max_rollbacks={training.max_rollbacks}); a lower optimizer.lr may help"
        )
    return "training.on_nonfinite=skip would go on without this batch"


def _done(run: Run, action: str) -> str:
    if action == "log":
        return "training goes on"
    count = f"{run.progress.skipped_in_a_row} in a row, {run.config.training.max_skipped_steps} end the run"
    missing = ", as there is no checkpoint to go back to"
    spiked = run.config.training.on_spike == "rollback" and run.gate.verdict.cause == "spike"
    return f"the step is skipped{missing if spiked else ''} ({count})"


def _told(run: Run, verdict: Verdict, row: dict[str, Any]) -> str:
    if verdict.cause == "spike":
        what = f"the loss is {verdict.loss:.4f}, usual is {verdict.usual:.4f}"
    else:
        what = NAMES[str(verdict.cause)]
    ranks = f" on rank{'s' * (len(row['ranks']) > 1)} {ranges(row['ranks'])}"
    samples = ", ".join(f"{first}-{last}" for first, last in row["samples"])
    return f"step {row['step']}: {what}{ranks if row['ranks'] else ''} (samples {samples})"


def _where(run: Run, verdict: Verdict) -> dict[str, Any]:
    """The ranks that computed what is bad, and the positions of its samples in the data, last included.

    A bad loss is of micro-batches; a bad gradient of all that its ranks had in the step; a spike of the whole
    step, as it is judged by the mean.
    """
    config, layout = run.config.training, run.layout
    first = run.progress.position - config.global_batch_size
    bad: dict[str, Callable[[], list[int]]] = {
        "loss": run.engine.losses.bad,
        "gradient": partial(_with_bad_gradients, run),
        "spike": list,
    }
    mine = bad[str(verdict.cause)]()
    size = config.micro_batch_size
    starts = [first + (m * layout.data_size + layout.data_rank) * size for m in mine]
    gathered: list[list[int]] = [[]] * layout.processes.world_size
    dist.all_gather_object(gathered, starts)
    samples = {start + offset for starts in gathered for start in starts for offset in range(size)}
    # A mean can be infinite where each of its parts is finite.
    places = spans(samples) or [[first, run.progress.position - 1]]
    return {"ranks": [rank for rank, starts in enumerate(gathered) if starts], "samples": places}


def _with_bad_gradients(run: Run) -> list[int]:
    """The micro-batches that this rank's gradients are of, if these are bad."""
    return list(range(run.accumulation)) if run.gate.gradients.are_bad() else []


def _restore_point(run: Run) -> tuple[Any, Manifest] | None:
    """The run's newest good checkpoint; None if there is none yet."""

    def find() -> tuple[Any, Manifest] | None:
        own = store.complete_checkpoints(run.folder)
        return store.first_good(own[::-1], checkpoint_check(run.config)) if own else None

    # It may read a whole checkpoint, after one that is being written: no step takes so long.
    with run.watchdog.limit("finding a checkpoint", run.config.training.slow_timeout_minutes):
        run.saver.wait()
        return from_main_rank(find)


def _go_back(run: Run, restored: tuple[Any, Manifest], row: dict[str, Any], why: str) -> None:
    """Load a checkpoint into the running engine; what comes next in the data is what follows the bad batch.

    The caller saves this moment: a run that resumes from that step would meet the spike again.
    """
    progress, deepspeed = run.progress, run.engine.deepspeed
    path, manifest = restored
    left_out = [manifest.position, progress.position - 1]
    kept = {name: getattr(progress, name) for name in ("position", "skipped", "source_tokens")}
    kept["rollbacks"] = progress.rollbacks + 1
    with run.watchdog.limit("going back to a checkpoint", run.config.training.slow_timeout_minutes):
        engine_state.load(deepspeed.module, deepspeed.optimizer, run.layout, path, manifest)
    progress.go_back(manifest)
    for name, value in kept.items():
        setattr(progress, name, value)
    run.log.rewind(progress.step)
    row |= {"spike_step": row["step"], "step": progress.step, "left_out": left_out}
    told = f"back to {path}, without samples {left_out[0]}-{left_out[1]}"
    run.log.event(
        row, f"warning: {why}; {told} ({progress.rollbacks} of at most {run.config.training.max_rollbacks})"
    )
