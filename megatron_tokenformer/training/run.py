"""One training run in this process, opened: data, engine, the point that it goes on from, and its log."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_tokenformer.checkpoint import engine_state, store
from megatron_tokenformer.checkpoint.manifest import Manifest, read_manifest
from megatron_tokenformer.config.load import dump_config
from megatron_tokenformer.config.schema import RunConfig, check_world
from megatron_tokenformer.config.sizes import parameter_count
from megatron_tokenformer.data.batches import Blend, open_blend
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.model.language_model import full_shapes
from megatron_tokenformer.parallel.layout import Layout, from_main_rank
from megatron_tokenformer.training.engine import Engine, build_engine
from megatron_tokenformer.training.metrics import FINISHED, MetricsLog
from megatron_tokenformer.training.progress import Progress


@dataclass(frozen=True)
class Run:
    """What is fixed during a run, and the progress that moves."""

    config: RunConfig
    layout: Layout
    engine: Engine
    accumulation: int
    training_data: Blend
    validation_data: Blend | None
    progress: Progress
    log: MetricsLog

    @property
    def folder(self) -> Path:
        """Where the run's checkpoints are."""
        return checkpoint_folder(self.config)


def checkpoint_folder(config: RunConfig) -> Path:
    """Where a run writes its checkpoints."""
    return Path(config.run_dir) / "checkpoints"


@contextlib.contextmanager
def open_run(config: RunConfig, layout: Layout) -> Iterator[Run]:
    """Open everything that a run needs, cheap checks first, and close its log in the end.

    Raises:
        UserError: data, checkpoint and configuration do not fit together.
    """
    accumulation = check_world(config, layout.processes.world_size)
    training_data, validation_data = open_data(config)
    # One rank decides for all: on a network file system each may see another newest checkpoint.
    path = from_main_rank(lambda: find_restore_point(config))
    restored = (path, read_manifest(path)) if path else None
    progress = Progress.from_manifest(restored[1]) if restored else Progress.fresh(config)
    engine = build_engine(config, layout, accumulation)
    if restored:
        engine_state.load(engine.deepspeed.module, engine.deepspeed.optimizer, layout, *restored)
    # At step 0 the first thing that a run does is to measure and log it again.
    with MetricsLog(config, progress.step or -1, layout.is_main) as log:
        run = Run(config, layout, engine, accumulation, training_data, validation_data, progress, log)
        announce(run, restored)
        yield run


def open_data(config: RunConfig) -> tuple[Blend, Blend | None]:
    """The training and validation blends, checked against the model's vocabulary."""
    if not config.data.train:
        raise UserError("data.train is empty; give the prefix of a preprocessed dataset, data.train=PREFIX")
    length, seed = config.data.sequence_length, config.training.seed
    training = open_blend(config.data.train, length, seed)
    validation = open_blend(config.data.validation, length, seed) if config.data.validation else None
    for blend in filter(None, (training, validation)):
        blend.check_vocabulary(config.model.vocab_size)
    return training, validation


def find_restore_point(config: RunConfig) -> Path | None:
    """The run's own newest checkpoint, else the one to load, else None.

    Raises:
        UserError: there is none where one was asked for, or it is of another model.
    """
    path = store.newest_good(checkpoint_folder(config))
    if path is None and config.checkpoint.load is not None:
        path = store.find_checkpoint(config.checkpoint.load)
    if path is None:
        return None
    stored = read_manifest(path).shapes
    for name, shape in full_shapes(config.model).items():
        there, here = stored.get(name), list(shape)
        if there != here:
            raise UserError(
                f"checkpoint {path} has {name} of shape {there}, the config's model has {here}; "
                f"use its own config, or grow it with tools/grow_checkpoint.py"
            )
    return path


def announce(run: Run, restored: tuple[Path, Manifest] | None) -> None:
    """Say what runs, on what, from where; and keep the resolved config beside the results."""
    if not run.layout.is_main:
        return
    config, progress = run.config, run.progress
    (Path(config.run_dir) / FINISHED).unlink(missing_ok=True)
    store.replace_durably(Path(config.run_dir) / "config.yaml", dump_config(config))
    tokens = config.model.tokens
    run.log.say(
        f"{parameter_count(config.model):,} parameters ({tokens.qkv}/{tokens.output}/{tokens.ffn} tokens per "
        f"layer), {run.engine.precision}; {run.layout}"
    )
    if restored:
        seen = f"{progress.tokens:,} tokens seen"
        run.log.say(f"from {restored[0]} at step {progress.step}, {seen}")
    needed = config.training.steps * config.training.global_batch_size
    for source in run.training_data.sources:
        epochs = needed * source.weight / source.windows
        run.log.say(f"data {source.prefix}: {source.tokens:,} tokens, {epochs:.2f} epochs in this run")
