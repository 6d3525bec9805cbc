"""What a run says when it starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_tokenformer.checkpoint.manifest import Manifest
from megatron_tokenformer.config.load import dump_config
from megatron_tokenformer.config.pipeline_cut import describe_pipeline
from megatron_tokenformer.config.schema import Precision, RunConfig
from megatron_tokenformer.config.sizes import FORMULAS, flops_per_token, parameter_count
from megatron_tokenformer.data.batches import SourceInfo
from megatron_tokenformer.durable import replace_durably
from megatron_tokenformer.metrics_file import FINISHED, INTERRUPTED
from megatron_tokenformer.parallel.layout import Layout
from megatron_tokenformer.training.throughput import peak_flops

if TYPE_CHECKING:
    from megatron_tokenformer.training.run import Run

# Up to about here repeated data is worth nearly as much as new data (Muennighoff et al., arXiv 2305.16264).
MANY_EPOCHS = 4


def announce(run: Run, restored: tuple[Path, Manifest] | None) -> None:
    """Say what runs, on what, from where; and keep the resolved config beside the results."""
    if not run.layout.is_main:
        return
    config, progress = run.config, run.progress
    for record in (FINISHED, INTERRUPTED):
        (Path(config.run_dir) / record).unlink(missing_ok=True)
    replace_durably(Path(config.run_dir) / "config.yaml", dump_config(config))
    tokens = config.model.tokens
    dense = config.model.is_dense
    what = "dense transformer" if dense else f"{tokens.qkv}/{tokens.output}/{tokens.ffn} tokens per layer"
    device = f"{run.engine.precision} on {run.layout.device.type}, {dist.get_backend()}"
    run.log.say(f"{parameter_count(config.model):,} parameters ({what}), {device}")
    for line in timeout_warnings(config):
        run.log.say(line)
    run.log.say(describe_operations(config, run.layout, run.engine.precision))
    run.log.say(describe_pipeline(config, run.accumulation))
    if restored:
        path, manifest = restored
        run.log.say(f"from {path} at step {progress.step}, {progress.tokens:,} tokens seen")
        for change in order_changes(manifest, config, progress.source_tokens) if manifest.position else ():
            run.log.say(f"note: {change}, so samples come in another order than the ones seen so far")
        scale = config.optimizer.old_token_lr_scale
        if scale < 1.0:
            how = f"train at {scale:g} of the learning rate" if scale else "are frozen"
            run.log.say(f"parameter tokens from before the last growth {how}")
    training, sources = config.training, run.training_data.sources
    needed = training.steps * training.global_batch_size
    evaluated = training.eval_steps * training.global_batch_size
    validation = run.validation_data.sources if run.validation_data is not None else []
    for line in data_table(sources, needed, config.data.sequence_length):
        run.log.say(line)
    for line in data_warnings(sources, validation, needed, evaluated):
        run.log.say(line)
    if run.eod_id is not None:
        run.log.say(f"token id {run.eod_id} ends documents")


def timeout_warnings(config: RunConfig) -> list[str]:
    """Where a collective would time out before the watchdog tells the stacks of all ranks."""
    limit = config.parallel.timeout_minutes
    return [
        f"warning: training.{name}={minutes:g} is not below parallel.timeout_minutes={limit:g}: where ranks "
        f"wait for each other, a stuck run would end without their stacks"
        for name in ("step_timeout_minutes", "slow_timeout_minutes")
        if (minutes := getattr(config.training, name)) >= limit
    ]


def describe_operations(config: RunConfig, layout: Layout, precision: Precision) -> str:
    """What a step's operations are counted by, and what their rate is held against for MFU."""
    count = flops_per_token(config.model, config.data.sequence_length)
    device = torch.cuda.get_device_name(layout.device) if layout.device.type == "cuda" else "this processor"
    peak = peak_flops(layout.device, precision)
    against = (
        f"no peak is known of {device} in {precision}, so no MFU"
        if peak is None
        else f"MFU is of {peak / 1e12:g} TFLOP/s, the {precision} peak of {device}"
    )
    return f"{count:.4g} operations per token = {FORMULAS[config.model.architecture]}; {against}"


def data_table(sources: Sequence[SourceInfo], samples: int, sequence_length: int) -> list[str]:
    """A table of what is drawn from each source, and of a blend in all.

    Args:
        samples: what the whole run draws, resumed parts included.
        sequence_length: tokens that a sample is trained on.
    """
    rows: list[tuple[str, ...]] = [("data", "share", "tokens", "drawn in this run", "epochs")]
    for source in sources:
        drawn = samples * source.weight
        rows.append(_row(source.prefix, source.weight, source.tokens, drawn, source.windows, sequence_length))
    if len(sources) > 1:
        tokens, windows = (sum(getattr(source, name) for source in sources) for name in ("tokens", "windows"))
        rows.append(_row("total", 1.0, tokens, samples, windows, sequence_length))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    ]


def data_warnings(
    sources: Sequence[SourceInfo], validation: Sequence[SourceInfo], samples: int, evaluated: int
) -> list[str]:
    """What a user should know of the data: much repeated sources, and what cannot be checked.

    Args:
        samples: what the whole run draws from `sources`.
        evaluated: what one evaluation draws from `validation`.
    """
    lines = []
    epochs = {source.prefix: samples * source.weight / source.windows for source in sources}
    many = [f"{prefix} ({times:.1f})" for prefix, times in epochs.items() if times > MANY_EPOCHS]
    if many:
        lines.append(
            f"warning: seen more than {MANY_EPOCHS} times in this run, and worth less each time: "
            f"{', '.join(many)}"
        )
    bare = dict.fromkeys(source.prefix for source in (*sources, *validation) if source.tokenizer is None)
    if bare:
        lines.append(f"note: no .json, so vocabulary and tokenizer cannot be checked: {', '.join(bare)}")
    windows = sum(source.windows for source in validation)
    if validation and evaluated > windows:
        lines.append(f"note: an evaluation takes {evaluated} samples, some twice: there are {windows}")
    return lines


def order_changes(manifest: Manifest, config: RunConfig, source_tokens: Mapping[str, int]) -> list[str]:
    """What differs from the checkpoint's run among the things that the order of samples depends on.

    Args:
        source_tokens: ids in each training source now, by prefix.
    """
    now = config.model_dump(mode="json")
    changes = []
    for section, key in (("training", "seed"), ("data", "sequence_length"), ("data", "train")):
        before, after = manifest.config.get(section, {}).get(key), now[section][key]
        if before != after:
            changes.append(f"{section}.{key} was {before} and is {after}")
    for prefix, tokens in source_tokens.items():
        had = manifest.source_tokens.get(prefix, tokens)
        if had != tokens:
            changes.append(f"{prefix} had {had:,} tokens and has {tokens:,}")
    return changes


def _row(
    name: str, share: float, tokens: int, drawn: float, windows: int, sequence_length: int
) -> tuple[str, ...]:
    trained_on = round(drawn * sequence_length)
    return name, f"{share:.2%}", f"{tokens:,}", f"{trained_on:,}", f"{drawn / windows:.2f}"
