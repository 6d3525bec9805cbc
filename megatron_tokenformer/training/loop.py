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
from megatron_tokenformer.model.tau import set_taus
from megatron_tokenformer.parallel.layout import Layout
from megatron_tokenformer.training.batches import Batch, pipeline_batches
from megatron_tokenformer.training.metrics import FINISHED
from megatron_tokenformer.training.phases import StepClock
from megatron_tokenformer.training.profiling import profiled
from megatron_tokenformer.training.progress import Progress
from megatron_tokenformer.training.run import Run, open_run
from megatron_tokenformer.training.schedule import learning_rate
from megatron_tokenformer.training.throughput import throughput


def train(config: RunConfig, layout: Layout, profile_steps: int = 0) -> Progress:
    """Run until `training.steps`, from the run's own newest checkpoint, or `checkpoint.load`, or the start.

    Args:
        profile_steps: so many steps are traced into RUN/profile.

    Raises:
        UserError: data, checkpoint and configuration do not fit together, or a save failed.
    """
    with open_run(config, layout) as run:
        folder = Path(config.run_dir) / "profile"
        with profiled(profile_steps, folder, layout, run.log.say) as after_step:
            train_steps(run, after_step)
        finish(run)
    return run.progress


def train_steps(run: Run, after_step: Callable[[], bool] = lambda: False) -> None:
    """Step, log, evaluate and save until the run has its steps.

    Args:
        after_step: called after every step; says whether a profiler slowed it.
    """
    training, progress, profiled = run.config.training, run.progress, False
    if progress.step == 0:
        evaluate(run)
    clock = StepClock(progress.step, run.layout.device)
    clock.watch(run.engine)
    batches = clock.waiting(
        pipeline_batches(
            run.training_data, progress.position, run.config, run.layout, run.accumulation, run.eod_id
        )
    )
    while progress.step < training.steps:
        loss = train_step(run, batches)
        profiled |= after_step()
        run.continuity.stepped(progress.step, progress.position, loss)
        if progress.step % training.log_interval == 0 or progress.step == training.steps:
            progress.loss = loss.item()
            log_step(run, clock.take(progress.step), profiled)
            profiled = False
        if due(training.eval_interval, progress.step, training.steps):
            evaluate(run)
            clock.restart(progress.step)
        if due(run.config.checkpoint.interval, progress.step, training.steps):
            save(run)
            clock.restart(progress.step)


def train_step(run: Run, batches: Iterator[Batch]) -> torch.Tensor:
    """One optimizer step over one global batch; returns its mean loss, the same on every rank."""
    config, progress = run.config, run.progress
    for group in run.engine.optimizer.param_groups:
        group["lr"] = learning_rate(config.optimizer, progress.step, config.training.steps)
    set_taus(run.engine.deepspeed.module, progress.taus, progress.step)
    # 1F1B over the micro-batches; gradients summed over tied stages and data ranks; clip; AdamW; all-gather.
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


def evaluate(run: Run) -> None:
    """Measure the validation loss over the first `eval_steps` global batches of the validation data."""
    training, progress = run.config.training, run.progress
    if run.validation_data is None or training.eval_steps == 0:
        return
    set_taus(run.engine.deepspeed.module, progress.taus, progress.step)
    micro_batches = training.eval_steps * run.accumulation
    batches = pipeline_batches(run.validation_data, 0, run.config, run.layout, micro_batches, run.eod_id)
    loss = run.engine.deepspeed.eval_batch(batches, num_micro_batches=micro_batches)
    progress.val_loss = loss.item()
    last = progress.history[-1] if progress.history else {}
    before = last.get("val_loss")
    if progress.step == 0 and before is not None:
        change = progress.val_loss - before
        done = "shrunk" if last.get("kind") == "shrink" else "grown"
        run.log.say(
            f"{done}: validation loss {before:.6f} before, {progress.val_loss:.6f} now ({change:+.0e})"
        )
    row = {
        "step": progress.step,
        "tokens": progress.tokens,
        "flops": progress.flops,
        "val_loss": progress.val_loss,
        "val_ppl": math.exp(min(progress.val_loss, 700.0)),
    }
    run.log.evaluation(row)


def log_step(run: Run, times: dict[str, float], profiled: bool) -> None:
    """Log the last step.

    Args:
        times: means over the steps since the last log line.
        profiled: a profiler slowed some of these.
    """
    config, progress = run.config, run.progress
    row = {
        "step": progress.step,
        "tokens": progress.tokens,
        "loss": progress.loss,
        "lr": learning_rate(config.optimizer, progress.step - 1, config.training.steps),
        "grad_norm": run.engine.grad_norm,
        "skipped_steps": run.engine.deepspeed.skipped_steps,
        "flops": progress.flops,
        "profiled": profiled,
        **times,
        **throughput(config, run.layout, run.engine.precision, run.accumulation, times["step_time_s"]),
    }
    run.log.training(row)


def save(run: Run) -> None:
    """Begin to write a checkpoint of this moment, and delete those that are no longer kept.

    Raises:
        UserError: a rank's data are no longer those that its position is in, or saves fail (see `Saver`).
    """
    all_or_none(run.progress.step, run.training_data.check_unchanged)
    zero, module = run.engine.deepspeed.optimizer, run.engine.deepspeed.module
    manifest = engine_state.with_optimizer(run.progress.manifest(run.config, run.layout), zero)
    held = engine_state.fragments(module, zero, run.layout)
    run.continuity.saved(run.progress.step)
    run.saver.start(manifest, held, last=run.progress.step == run.config.training.steps)


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
