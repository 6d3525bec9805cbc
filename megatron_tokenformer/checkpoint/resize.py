"""What growing and shrinking a checkpoint have in common: the plan, the room, the folder, the manifest.

Each makes, from a checkpoint of a run, one at step 0 of a new run whose model differs in its tokens alone, or
in its width if it is dense.
"""

from __future__ import annotations

import datetime
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from megatron_tokenformer.checkpoint import store
from megatron_tokenformer.checkpoint.manifest import WEIGHT, Manifest, Shard, read_manifest
from megatron_tokenformer.checkpoint.stored_model import stored_config
from megatron_tokenformer.config.growth import WIDTHS, Growth, Shrinking, Widening
from megatron_tokenformer.config.schema import Model, RunConfig
from megatron_tokenformer.config.sizes import parameter_count
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.model.language_model import full_shapes
from megatron_tokenformer.model.tau import Taus, taus_to_json

SPARE_BYTES = 16 * 1024 * 1024
"""room that is asked for beyond the numbers themselves: headers, the manifest, folders"""


@dataclass(frozen=True)
class ResizePlan:
    """A checkpoint, and what it shall become."""

    source: Path
    """absolute, as the history tells it to readers anywhere"""
    folder: Path
    """where the new checkpoint goes, beside `latest`"""
    old: Manifest
    before: Model
    target: RunConfig
    rule: Growth | Shrinking | Widening

    kind: ClassVar[Literal["growth", "shrink", "net2net"]]
    """what the history calls it; an entry without a kind is a growth"""
    verb: ClassVar[str]

    @property
    def states(self) -> list[str]:
        """What the new checkpoint stores of each parameter."""
        return [WEIGHT] if self.rule.optimizer == "reset" else self.old.states

    @property
    def stored_bytes(self) -> int:
        """Size of the shards of the checkpoint to begin with."""
        return sum(shard.size for shard in self.old.shards)

    @property
    def one_file_system(self) -> bool:
        """Whether source and target are on one file system, so that links are possible."""
        return self.source.stat().st_dev == _nearest_folder(self.folder).stat().st_dev

    @property
    def free_bytes(self) -> int:
        """Free space on the disk of the target."""
        return shutil.disk_usage(_nearest_folder(self.folder)).free


def read_source(source: Path) -> tuple[Manifest, Model]:
    """The manifest of the checkpoint to begin with, and the model in it.

    Raises:
        UserError: the manifest, or the config in it, is damaged.
    """
    old = read_manifest(source)
    return old, stored_config(source, old).model


RUNS_OWN = ("checkpoints", "metrics.jsonl", "finished.json", ".lock")
"""what only a run makes in a folder"""


def check_folder(source: Path, folder: Path, verb: str) -> None:
    """Refuse to write into a run's folder, among a run's checkpoints, or over the source itself.

    Raises:
        UserError: says what is there.
    """
    steps = [path.name for path in store.complete_checkpoints(folder) if path.name != store.step_name(0)]
    found = [*steps[-1:], *(name for name in RUNS_OWN if (folder / name).exists())]
    if found:
        raise UserError(f"{folder} holds {found[0]}, so it is a run's; {verb} into a folder of its own")
    target = folder / store.step_name(0)
    if target.exists() and target.samefile(source):
        raise UserError(f"{folder} is where {source} is, which would be replaced; {verb} into another folder")


def check_writable(plan: ResizePlan) -> None:
    """Refuse a folder in which no file can be made.

    Raises:
        UserError: says where, and why.
    """
    folder = _nearest_folder(plan.folder)
    try:
        with tempfile.TemporaryFile(dir=folder):  # rights do not tell: root has all, even in /proc
            pass
    except OSError as error:
        why = f"nothing can be written in {folder} ({error.strerror}); give another --save"
        raise UserError(f"cannot {plan.verb} {plan.source} into {plan.folder}: {why}", exit_code=1) from None


def check_space(plan: ResizePlan, size: int) -> None:
    """Refuse what the disk has no room for.

    Args:
        size: bytes that the new checkpoint takes.

    Raises:
        UserError: with what is needed and what is free.
    """
    needed, free = size + SPARE_BYTES, plan.free_bytes
    if needed > free:
        raise UserError(
            f"cannot {plan.verb} {plan.source} into {plan.folder}: it takes {in_bytes(needed)}, and there "
            f"{in_bytes(free)} are free; make room or give another --save",
            exit_code=1,
        )


def write_whole(plan: ResizePlan, size: int, write: Callable[[Path], Manifest]) -> tuple[Path, Manifest]:
    """Make the new checkpoint, complete or not at all; the source is left as it is.

    Args:
        size: bytes that it takes.
        write: writes the shards into the folder that it is given, and returns the manifest.

    Raises:
        UserError: there is no room, a shard is damaged, or the folder cannot be written; nothing new is then
            there.
    """
    temporary = plan.folder / store.temporary_name(0)
    try:
        store.clear_leftovers(plan.folder)
        check_space(plan, size)
        store.make_empty(temporary)
        manifest = write(temporary)
        return store.publish(temporary, manifest), manifest
    except OSError as error:
        why = f"cannot {plan.verb} {plan.source} into {plan.folder}: {error.strerror}"
        raise UserError(why, exit_code=1) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def new_manifest(
    plan: ResizePlan, taus: Taus, shards: list[Shard], told: dict[str, Any], exact: bool
) -> Manifest:
    """The manifest of the new checkpoint, at step 0 of its run, with one more entry in the history.

    Args:
        told: what else the entry says, beside the rule.
        exact: whether the function is the same, and so the losses are the new model's too.
    """
    old, model = plan.old, plan.target.model
    entry = {
        "kind": plan.kind,
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "from": str(plan.source),
        "step": old.step,
        "val_loss": old.val_loss,
        **sizes(plan),
        **plan.rule.model_dump(),
        **told,
    }
    return replace(
        old,
        config=plan.target.model_dump(mode="json"),
        step=0,
        loss=old.loss if exact else None,
        val_loss=old.val_loss if exact else None,
        adam_step=old.adam_step if plan.rule.optimizer == "carry" else 0,
        taus=taus_to_json(taus),
        shapes={name: list(shape) for name, shape in full_shapes(model).items()},
        states=plan.states,
        shards=shards,
        history=[*old.history, entry],
        recent_losses=[],
        setbacks={},
        owes_evaluation=False,
    )


def sizes(plan: ResizePlan) -> dict[str, Any]:
    """What differs between the two models: tokens or widths, and parameters, `_before` and `_after`."""
    both = {"before": plan.before, "after": plan.target.model}
    if plan.before.is_dense:
        own = {f"{key}_{when}": getattr(model, key) for key in WIDTHS for when, model in both.items()}
    else:
        own = {f"tokens_{when}": model.tokens.model_dump() for when, model in both.items()}
    return {**own, **{f"parameters_{when}": parameter_count(model) for when, model in both.items()}}


def in_bytes(count: int) -> str:
    """A size for people: `1.48 GB`."""
    unit, size = next(
        ((unit, size) for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)) if count >= size),
        ("bytes", 1),
    )
    return f"{count / size:,.2f} {unit}" if size > 1 else f"{count} {unit}"


def _nearest_folder(folder: Path) -> Path:
    """The folder, or the one in which it will be made."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())
