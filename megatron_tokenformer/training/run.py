"""One training run in this process, opened: data, engine, the point that it goes on from, and its log."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_tokenformer.checkpoint import engine_state, store
from megatron_tokenformer.checkpoint.manifest import Manifest, read_manifest
from megatron_tokenformer.config.load import dump_config
from megatron_tokenformer.config.schema import Model, RunConfig, check_world
from megatron_tokenformer.config.sizes import parameter_count
from megatron_tokenformer.data.batches import Blend, open_blend
from megatron_tokenformer.data.documents import end_of_document_id
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
    eod_id: int | None
    """the id that ends documents, where an option needs it"""
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
    training_data, validation_data = _open_data_everywhere(config)
    eod_id = from_main_rank(lambda: find_eod_id(config))
    # One rank decides for all: on a network file system each may see another newest checkpoint.
    path = from_main_rank(lambda: find_restore_point(config))
    restored = (path, read_manifest(path)) if path else None
    progress = Progress.from_manifest(restored[1]) if restored else Progress.fresh(config)
    steps, done = config.training.steps, progress.step
    if done > steps:
        raise UserError(
            f"{config.run_dir} has done {done} steps, more than training.steps={steps}; "
            f"training.steps={done} would work, or another run_dir"
        )
    engine = build_engine(config, layout, accumulation)
    if restored:
        engine_state.load(engine.deepspeed.module, engine.deepspeed.optimizer, layout, *restored)
    # At step 0 the first thing that a run does is to measure and log it again.
    with MetricsLog(config, progress.step or -1, layout.is_main) as log:
        run = Run(config, layout, engine, accumulation, training_data, validation_data, eod_id, progress, log)
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


def find_eod_id(config: RunConfig) -> int | None:
    """The end-of-document id of all the data, or None if no option needs it.

    Raises:
        UserError: it is needed, not given, and the datasets do not tell it or do not agree.
    """
    data = config.data
    options = {"isolate_documents": data.isolate_documents, "eod_mask_loss": data.eod_mask_loss}
    needed_by = next((f"data.{key}" for key, on in options.items() if on), None)
    if needed_by is None:
        return None
    if data.eod_id is not None:
        return data.eod_id
    return end_of_document_id([prefix for _, prefix in (*data.train, *data.validation)], needed_by)


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
    check_model(path, read_manifest(path), config.model)
    return path


def check_model(path: Path, manifest: Manifest, model: Model) -> None:
    """Refuse a checkpoint that is of another model, be it of the same shapes.

    Raises:
        UserError: names the tensor or the key, and both values.
    """
    for name, shape in full_shapes(model).items():
        there, here = manifest.shapes.get(name), list(shape)
        if there != here:
            raise UserError(
                f"checkpoint {path} has {name} of shape {there}, the config's model has {here}; "
                f"use its own config, or grow it with tools/grow_checkpoint.py"
            )
    for key, here in model.model_dump(mode="json").items():
        there = manifest.config.get("model", {}).get(key)
        if there != here:
            raise UserError(f"checkpoint {path} was made with model.{key}={there}, the config has {here}")


def _open_data_everywhere(config: RunConfig) -> tuple[Blend, Blend | None]:
    """Open the data on every rank; a mistake that all make is told once, one rank's own by that rank."""
    from_main_rank(lambda: open_data(config) and None)
    try:
        return open_data(config)
    except UserError as error:
        raise UserError(str(error), exit_code=1) from None


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
        path, manifest = restored
        run.log.say(f"from {path} at step {progress.step}, {progress.tokens:,} tokens seen")
        for change in order_changes(manifest, config):
            run.log.say(f"note: {change}, so samples come in another order than the ones seen so far")
    needed = config.training.steps * config.training.global_batch_size
    for source in run.training_data.sources:
        epochs = needed * source.weight / source.windows
        run.log.say(f"data {source.prefix}: {source.tokens:,} tokens, {epochs:.2f} epochs in this run")
    if run.eod_id is not None:
        run.log.say(f"token id {run.eod_id} ends documents")
    if run.validation_data is not None:
        samples = config.training.eval_steps * config.training.global_batch_size
        windows = sum(source.windows for source in run.validation_data.sources)
        if samples > windows:
            run.log.say(f"note: an evaluation takes {samples} samples, some twice: there are {windows}")


def order_changes(manifest: Manifest, config: RunConfig) -> list[str]:
    """What differs from the checkpoint's run among the things that the order of samples depends on."""
    now = config.model_dump(mode="json")
    changes = []
    for section, key in (("training", "seed"), ("data", "sequence_length"), ("data", "train")):
        before, after = manifest.config.get(section, {}).get(key), now[section][key]
        if before != after:
            changes.append(f"{section}.{key} was {before} and is {after}")
    return changes
