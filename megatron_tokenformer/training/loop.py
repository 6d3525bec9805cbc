"""The training loop: step, log, evaluate, save until the run has its steps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from megatron_tokenformer.checkpoint import engine_state, store
from megatron_tokenformer.checkpoint.saving import all_or_none
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.config.sizes import parameter_count, step_flops, tokens_per_step
from megatron_tokenformer.durable import replace_durably
from megatron_tokenformer.errors import TO_BE_CONTINUED
from megatron_tokenformer.metrics_file import FINISHED, INTERRUPTED
from megatron_tokenformer.model.tau import set_taus
from megatron_tokenformer.parallel.layout import Layout, from_main_rank
from megatron_tokenformer.training.batches import Batch, pipeline_batches
from megatron_tokenformer.training.phases import StepClock
from megatron_tokenformer.training.profiling import profiled
from megatron_tokenformer.training.run import Run, open_run
from megatron_tokenformer.training.schedule import learning_rate
from megatron_tokenformer.training.setbacks import settle
from megatron_tokenformer.training.signals import Requests, ignore_requests
from megatron_tokenformer.training.stragglers import tell_stragglers
from megatron_tokenformer.training.task_scores import score_tasks
from megatron_tokenformer.training.throughput import throughput

RESIZED = {"growth": "grown", "net2net": "grown", "shrink": "shrunk", "import": "imported"}
"""what a kind of entry in a checkpoint's history means, in a word"""


def train(
    config: RunConfig, layout: Layout, profile_steps: int = 0, requests: Requests | None = None
) -> str | None:
    """Run until `training.steps`, from the run's own newest checkpoint, or `checkpoint.load`, or the start.

    Args:
        profile_steps: so many steps are traced into RUN/profile.
        requests: to leave, if somebody takes them already.

    Returns:
        Why it left before its end, all being saved, on every rank; None if it has all its steps.

    Raises:
        UserError: data, checkpoint and configuration do not fit together, a save failed, or numbers went
            wrong too often.
    """
    with open_run(config, layout, requests) as run:
        folder = Path(config.run_dir) / "profile"
        with profiled(profile_steps, folder, layout, run.log.say) as after_step:
            left = train_steps(run, after_step)
        if left is None:
            finish(run)
        else:
            record_interruption(run, left)
    return left


def train_steps(run: Run, after_step: Callable[[], bool] = lambda: False) -> str | None:
    """Step, log, evaluate and save until the run has its steps, or all ranks are to leave; why they are.

    Args:
        after_step: called after every step; says whether a profiler slowed it.
    """
    training, progress, profiled = run.config.training, run.progress, False
    if progress.step == 0 or progress.owes_evaluation:
        evaluate(run)
    if progress.step == 0:
        tell_resizing(run)
    clock = StepClock(progress.step, run.layout.device)
    clock.watch(run.engine)
    batches = open_batches(run, clock)
    minutes = training.slow_timeout_minutes
    while progress.step < training.steps:
        with run.watchdog.limit(f"step {progress.step + 1}", minutes):
            loss = train_step(run, batches)
            minutes = training.step_timeout_minutes
            profiled |= after_step()
            if settle(run):  # it went back to a checkpoint
                save(run)
                batches = open_batches(run, clock)
                continue
            run.continuity.stepped(progress.step, progress.position, loss)
            if progress.step % training.log_interval == 0 or progress.step == training.steps:
                log_step(run, loss.item(), clock.take(progress.step), profiled)
                profiled = False
        leave = run.gate.leave if progress.step < training.steps else None
        if due(training.eval_interval, progress.step, training.steps):
            # It is made up for when the run goes on: who asked to leave may not wait for long.
            progress.owes_evaluation = leave is not None
            if leave is None:
                evaluate(run)
                clock.restart(progress.step)
        if leave or due(run.config.checkpoint.interval, progress.step, training.steps):
            save(run, last=leave is not None)
            clock.restart(progress.step)
        if leave:
            return leave
        if due_tasks(run):
            score_tasks(run)
            clock.restart(progress.step)
    return None


def open_batches(run: Run, clock: StepClock) -> Iterator[Batch]:
    """The micro-batches from where the run is on."""
    clock.restart(run.progress.step)
    position = run.progress.position
    data = (run.training_data, position, run.config, run.layout, run.accumulation, run.eod_id)
    return clock.waiting(pipeline_batches(*data))


def train_step(run: Run, batches: Iterator[Batch]) -> torch.Tensor:
    """One optimizer step over one global batch; returns its mean loss, the same on every rank."""
    config, progress = run.config, run.progress
    for group in run.engine.optimizer.param_groups:
        group["lr"] = learning_rate(config.optimizer, progress.step, config.training.steps)
    set_taus(run.engine.deepspeed.module, progress.taus, progress.step)
    # 1F1B over the micro-batches; gradients summed over tied stages and data ranks; the gate, which agrees
    # with all ranks whether the weights may change (health.py); clip; AdamW; all-gather.
    loss: torch.Tensor = run.engine.deepspeed.train_batch(batches)
    progress.step += 1
    progress.position += config.training.global_batch_size
    progress.tokens += tokens_per_step(config)
    progress.flops += step_flops(config)
    run.log.advance()
    return loss


def due(interval: int, step: int, steps: int) -> bool:
    """Whether something done every `interval` steps (0: never) and at the end is due after `step`."""
    return step == steps or (interval > 0 and step % interval == 0)


def due_tasks(run: Run) -> bool:
    """Whether the tasks are to be run on the checkpoint of this step."""
    tasks, step = run.config.evaluation, run.progress.step
    return bool(tasks.tasks) and due(tasks.interval, step, run.config.training.steps)


def evaluate(run: Run) -> None:
    """Measure the validation loss over the first `eval_steps` global batches of the validation data."""
    training, progress = run.config.training, run.progress
    progress.owes_evaluation = False
    if run.validation_data is None or training.eval_steps == 0:
        return
    set_taus(run.engine.deepspeed.module, progress.taus, progress.step)
    micro_batches = training.eval_steps * run.accumulation
    batches = pipeline_batches(run.validation_data, 0, run.config, run.layout, micro_batches, run.eod_id)
    with run.watchdog.limit("the evaluation", training.slow_timeout_minutes):
        loss = run.engine.deepspeed.eval_batch(batches, num_micro_batches=micro_batches)
    progress.val_loss = loss.item()
    row = {
        "step": progress.step,
        "tokens": progress.tokens,
        "flops": progress.flops,
        "val_loss": progress.val_loss,
        "val_ppl": math.exp(min(progress.val_loss, 700.0)),
    }
    run.log.evaluation(row)


def tell_resizing(run: Run) -> None:
    """At the start of a run from a grown, shrunk or imported model: what changed, the loss before and after.

    The losses are comparable where both were measured on the same validation data.
    """
    progress = run.progress
    if not progress.history:
        return
    last = progress.history[-1]
    kind = last.get("kind", "growth")
    changed = {key: value for key, value in last.items() if key.endswith(("_before", "_after"))}
    # How far the run was that it comes from.
    row = {"step": 0, "event": kind, **changed, "from_step": last.get("step"), "tokens": progress.tokens}
    row |= {"flops": progress.flops, "val_loss_before": last.get("val_loss"), "val_loss_after": None}
    told = RESIZED[kind]
    if "parameters_before" in row:
        told += f" from {row['parameters_before']:,} to {row['parameters_after']:,} parameters"
    if last.get("val_loss") is not None and run.validation_data is not None and progress.val_loss is not None:
        before, after = last["val_loss"], progress.val_loss
        row["val_loss_after"] = after
        told += f": validation loss {before:.6f} before, {after:.6f} now ({after - before:+.0e})"
    run.log.event(row, told)


def log_step(run: Run, loss: float, times: dict[str, float], profiled: bool) -> None:
    """Log the last step.

    Args:
        times: means over the steps since the last log line.
        profiled: a profiler slowed some of these.
    """
    config, progress = run.config, run.progress
    if math.isfinite(loss):
        progress.loss = loss
    row = {
        "step": progress.step,
        "tokens": progress.tokens,
        "loss": loss,
        "lr": learning_rate(config.optimizer, progress.step - 1, config.training.steps),
        "grad_norm": run.engine.grad_norm,
        "skipped_steps": progress.skipped,
        "flops": progress.flops,
        "profiled": profiled,
        **times,
        **throughput(config, run.layout, run.engine.precision, run.accumulation, times["step_time_s"]),
    }
    run.log.training(row | tell_stragglers(run, times))


def save(run: Run, last: bool = False) -> None:
    """Begin to write a checkpoint of this moment, and delete those that are no longer kept.

    Args:
        last: the run ends with it, so it is waited for and must not fail; that of the last step is.

    Raises:
        UserError: a rank's data are no longer those that its position is in, or saves fail (see `Saver`).
    """
    last = last or run.progress.step == run.config.training.steps
    with run.watchdog.limit("a checkpoint", run.config.training.slow_timeout_minutes):
        all_or_none(run.progress.step, run.training_data.check_unchanged)
        zero, module = run.engine.deepspeed.optimizer, run.engine.deepspeed.module
        manifest = engine_state.with_optimizer(run.progress.manifest(run.config, run.layout), zero)
        held = engine_state.fragments(module, zero, run.layout)
        run.continuity.saved(run.progress.step)
        run.saver.start(manifest, held, last=last)


def record_interruption(run: Run, why: str) -> None:
    """Record that the run was asked to leave and has saved; launchers pass exit codes on or do not."""
    run.continuity.write()
    record = {"step": run.progress.step, "reason": why, "exit_code": TO_BE_CONTINUED}
    path = Path(run.config.run_dir) / INTERRUPTED

    def write() -> str | None:
        try:
            replace_durably(path, json.dumps(record, indent=1) + "\n")
        except OSError as error:
            return f"{path} was not written: {error.strerror}"
        return None

    # All wait for it: when the first rank ends, a launcher may end the others.
    if failed := from_main_rank(write):
        run.log.say(f"warning: {failed}; the exit code alone tells that the run is to be continued")
    ignore_requests()
    run.log.say(f"left at step {run.progress.step} for {why}; the same command goes on from there")


def finish(run: Run) -> None:
    """Record that the run has all its steps; launchers' exit codes do not prove it."""
    run.continuity.write()
    if run.layout.is_main:
        progress = run.progress
        record = {
            "step": progress.step,
            "tokens": progress.tokens,
            "flops": progress.flops,
            "loss": progress.loss,
            "val_loss": progress.val_loss,
            "parameters": parameter_count(run.config.model),
            "checkpoint": str(store.find_checkpoint(run.folder)),
        }
        replace_durably(Path(run.config.run_dir) / FINISHED, json.dumps(record, indent=1) + "\n")
