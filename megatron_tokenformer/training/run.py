"""One training run in this process, opened: data, engine, the point that it goes on from, and its log."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_tokenformer.checkpoint import engine_state, store
from megatron_tokenformer.checkpoint.manifest import Manifest, read_manifest
from megatron_tokenformer.checkpoint.saving import Saver
from megatron_tokenformer.checkpoint.shards import verify_checkpoint
from megatron_tokenformer.checkpoint.stored_model import differing_shape
from megatron_tokenformer.config.schema import Model, RunConfig, check_world
from megatron_tokenformer.data.batches import Blend, open_blend
from megatron_tokenformer.data.documents import needed_eod_id
from megatron_tokenformer.data.pair import Identity
from megatron_tokenformer.data.provenance import (
    TokenizerRecord,
    check_configured,
    check_continued,
    one_tokenizer,
)
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.evaluation.zero_shot import Tasks
from megatron_tokenformer.parallel.layout import Layout, each_rank, from_main_rank
from megatron_tokenformer.training.announce import announce
from megatron_tokenformer.training.continuity import Continuity
from megatron_tokenformer.training.engine import Engine, build_engine
from megatron_tokenformer.training.health import Gate
from megatron_tokenformer.training.metrics import MetricsLog
from megatron_tokenformer.training.old_tokens import slow_old_tokens, slowed_rows
from megatron_tokenformer.training.progress import Progress
from megatron_tokenformer.training.run_lock import only_run
from megatron_tokenformer.training.signals import Requests, requests_to_leave
from megatron_tokenformer.training.sinks import check_packages
from megatron_tokenformer.training.task_scores import prepare_tasks
from megatron_tokenformer.training.watchdog import Watchdog


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
    saver: Saver
    continuity: Continuity
    gate: Gate
    watchdog: Watchdog
    tasks: Tasks | None
    """of its evaluations, on the main rank"""

    @property
    def folder(self) -> Path:
        """Where the run's checkpoints are."""
        return checkpoint_folder(self.config)


def checkpoint_folder(config: RunConfig) -> Path:
    """Where a run writes its checkpoints."""
    return Path(config.run_dir) / "checkpoints"


def checkpoint_check(config: RunConfig) -> Callable[[Path], Manifest]:
    """What a checkpoint must pass to be loaded: sizes, and hashes too with checkpoint.verify."""
    return verify_checkpoint if config.checkpoint.verify else read_manifest


@contextlib.contextmanager
def open_run(config: RunConfig, layout: Layout, requests: Requests | None = None) -> Iterator[Run]:
    """Open everything that a run needs, cheap checks first; in the end wait for its save and close its log.

    Args:
        requests: to leave, if somebody takes them already; else they are taken here.

    Raises:
        UserError: data, checkpoint and configuration do not fit together.
    """
    accumulation = check_world(config, layout.processes.world_size)
    from_main_rank(lambda: check_packages(config.logging))
    training_data, validation_data = _open_data_everywhere(config)
    tokenizer = common_tokenizer(training_data, validation_data)
    eod_id = from_main_rank(lambda: find_eod_id(config))
    with contextlib.ExitStack() as held:
        if requests is None:
            requests = held.enter_context(requests_to_leave(config.training.max_minutes))
        from_main_rank(lambda: held.enter_context(only_run(Path(config.run_dir))))
        # One rank decides for all: on a network file system each may see another newest checkpoint.
        # And it alone clears away what dead saves left, before it looks.
        from_main_rank(lambda: store.clear_leftovers(checkpoint_folder(config)))
        # It hands its manifest on: of thousands of shards, for every rank to read it again takes long.
        restored = from_main_rank(lambda: find_restore_point(config, tokenizer))
        tasks = prepare_tasks(config, tokenizer, layout)
        progress = _progress(config, restored, training_data)
        progress.tokenizer = tokenizer or progress.tokenizer
        slowed = slowed_rows(config.optimizer, restored[1] if restored else None)
        engine = build_engine(config, layout, accumulation)
        parts = (engine.deepspeed.module, engine.deepspeed.optimizer, layout)
        if restored:
            engine_state.load(*parts, *restored)
        if slowed:
            slow_old_tokens(*parts, slowed, config.optimizer.old_token_lr_scale)
        folder, loaded = checkpoint_folder(config), restored[0] if restored else None
        continuity = Continuity(config, layout, folder, engine.precision, loaded, progress.position)
        gate = Gate(config, layout, engine, progress, requests)
        # At step 0 the first thing that a run does is to measure and log it again.
        with (
            MetricsLog(config, progress.step or -1, layout.is_main) as log,
            Saver(folder, config.checkpoint, layout, log.say) as saver,
            Watchdog(layout.rank) as watchdog,
        ):
            data = (training_data, validation_data, eod_id)
            guards = (continuity, gate, watchdog)
            run = Run(config, layout, engine, accumulation, *data, progress, log, saver, *guards, tasks)
            announce(run, restored)
            yield run


def _progress(config: RunConfig, restored: tuple[Path, Manifest] | None, data: Blend) -> Progress:
    """How far the run is, going on from what was restored or from the start.

    Raises:
        UserError: further than it shall go.
    """
    progress = Progress.from_manifest(restored[1]) if restored else Progress.fresh(config)
    progress.source_tokens = {source.prefix: source.tokens for source in data.sources}
    steps, done = config.training.steps, progress.step
    if done > steps:
        raise UserError(
            f"{config.run_dir} has done {done} steps, more than training.steps={steps}; "
            f"training.steps={done} would work, or another run_dir"
        )
    return progress


def open_data(config: RunConfig) -> tuple[Blend, Blend | None]:
    """The training and validation blends, of one tokenizer whose ids the model knows.

    Raises:
        UserError: data are missing (exit code 2), do not fit the config or each other (2), are damaged (1).
    """
    if not config.data.train:
        raise UserError("data.train is empty; give the prefix of a preprocessed dataset, data.train=PREFIX")
    length, seed = config.data.sequence_length, config.training.seed
    training = open_blend(config.data.train, length, seed)
    validation = open_blend(config.data.validation, length, seed) if config.data.validation else None
    for blend in filter(None, (training, validation)):
        blend.check_vocabulary(config.model.vocab_size)
    common_tokenizer(training, validation)  # refuses two
    return training, validation


def common_tokenizer(training: Blend, validation: Blend | None) -> TokenizerRecord | None:
    """The tokenizer that made all data of a run; None if no description tells.

    Raises:
        UserError: two sources differ.
    """
    sources = [*training.sources, *(validation.sources if validation is not None else [])]
    return one_tokenizer((source.prefix, source.tokenizer) for source in sources)


def find_eod_id(config: RunConfig) -> int | None:
    """The end-of-document id of all the data, or None if no option needs it.

    Raises:
        UserError: it is needed, not given, and the datasets do not tell it or do not agree.
    """
    data = config.data
    prefixes = [prefix for _, prefix in (*data.train, *data.validation)]
    return needed_eod_id(prefixes, data.isolate_documents, data.eod_mask_loss, data.eod_id)


def find_restore_point(config: RunConfig, tokenizer: TokenizerRecord | None) -> tuple[Path, Manifest] | None:
    """The run's own newest good checkpoint, else that of `checkpoint.load`, else None.

    Args:
        tokenizer: what made the data that the run would go on with; None if unknown.

    Raises:
        UserError: there is none where one was asked for or all are bad, or it is of another model or
            tokenizer.
    """
    check = checkpoint_check(config)
    folder, load = checkpoint_folder(config), config.checkpoint.load
    own = store.complete_checkpoints(folder)
    if own:
        try:
            path, manifest = store.first_good(own[::-1], check)
        except UserError as error:
            raise UserError(f"{error}; to start the run anew, remove {folder}", exit_code=1) from None
    elif load is not None:
        path, manifest = store.first_good(store.find_checkpoints(load), check)
    else:
        return None
    check_model(path, manifest, config.model)
    check_continued(path, manifest.tokenizer, tokenizer)
    return path, manifest


def check_model(path: Path, manifest: Manifest, model: Model) -> None:
    """Refuse a checkpoint that is of another model, be it of the same shapes.

    Raises:
        UserError: names the tensor or the key, and both values.
    """
    stored = manifest.config.get("model", {})
    # Of another architecture every shape differs, and none tells why.
    differs = differing_shape(manifest, model) if stored.get("architecture") == model.architecture else None
    if differs:
        name, there, here = differs
        raise UserError(
            f"checkpoint {path} has {name} of shape {there}, the config's model has {here}; "
            f"use its own config, or grow it with `tokenformer grow_checkpoint`"
        )
    for key, here in model.model_dump(mode="json").items():
        there = stored.get(key)
        if there != here:
            raise UserError(f"checkpoint {path} was made with model.{key}={there}, the config has {here}")


def _open_data_everywhere(config: RunConfig) -> tuple[Blend, Blend | None]:
    """Open the data on every rank, and see that all read the same: nodes may have copies of their own.

    Raises:
        UserError: the main rank's mistake, which is likely everyone's, or names the ranks that differ.
    """

    def open_on_main_rank() -> dict[str, Identity]:
        blends = open_data(config)
        made_with, configured = common_tokenizer(*blends), config.data.tokenizer
        if made_with is not None and configured is not None:
            check_configured(made_with, **configured.model_dump())
        return _identities(*blends)

    expected = from_main_rank(open_on_main_rank)

    def open_here() -> tuple[Blend, Blend | None]:
        blends = open_data(config)
        check_same(_identities(*blends), expected)
        return blends

    return each_rank(open_here)


def _identities(training: Blend, validation: Blend | None) -> dict[str, Identity]:
    return training.identities() | (validation.identities() if validation is not None else {})


def check_same(here: dict[str, Identity], expected: dict[str, Identity]) -> None:
    """Refuse data that differ from the main rank's.

    Raises:
        UserError: names the first source that differs.
    """
    for prefix, mine in here.items():
        main = expected.get(prefix)
        if main is None:
            raise UserError(f"{prefix} is read here, but not by the main rank; give all ranks one config")
        if mine != main:
            raise UserError(
                f"{prefix} is other data than on the main rank ({mine.tokens:,} tokens in {mine.documents:,} "
                f"documents here, {main.tokens:,} in {main.documents:,} there); copy the same files to all"
            )
