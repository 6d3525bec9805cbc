"""What growing and shrinking a checkpoint have in common: the plan, the room, the folder, the manifest.

Each makes, from a checkpoint of a run, one at step 0 of a new run whose model differs in its tokens alone, or
in its width if it is dense.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from megatron_tokenformer.checkpoint import store
from megatron_tokenformer.checkpoint.manifest import WEIGHT, Manifest, Shard, read_manifest
from megatron_tokenformer.checkpoint.step_zero import history_entry, nearest_folder
from megatron_tokenformer.checkpoint.stored_model import stored_config
from megatron_tokenformer.config.growth import WIDTHS, Growth, Shrinking, Widening
from megatron_tokenformer.config.schema import Model, RunConfig
from megatron_tokenformer.config.sizes import parameter_count
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.model.language_model import full_shapes
from megatron_tokenformer.model.tau import Taus, taus_to_json


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
    def doing(self) -> str:
        """What is done, for an error that says that it cannot be."""
        return f"{self.verb} {self.source} into {self.folder}"

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
        return self.source.stat().st_dev == nearest_folder(self.folder).stat().st_dev

    @property
    def free_bytes(self) -> int:
        """Free space on the disk of the target."""
        return shutil.disk_usage(nearest_folder(self.folder)).free


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


def new_manifest(
    plan: ResizePlan, taus: Taus, shards: list[Shard], told: dict[str, Any], exact: bool
) -> Manifest:
    """The manifest of the new checkpoint, at step 0 of its run, with one more entry in the history.

    Args:
        told: what else the entry says, beside the rule.
        exact: whether the function is the same, and so the losses are the new model's too.
    """
    old, model = plan.old, plan.target.model
    about = {
        "step": old.step,
        "val_loss": old.val_loss,
        **sizes(plan),
        **plan.rule.model_dump(),
        **told,
    }
    entry = history_entry(plan.kind, str(plan.source), **about)
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
