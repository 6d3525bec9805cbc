"""What a growth will read, link and write, and whether the disk has room for it: known before it begins."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from megatron_tokenformer.checkpoint import store
from megatron_tokenformer.checkpoint.manifest import WEIGHT, Manifest, read_manifest
from megatron_tokenformer.config.growth import Growth, check_growth
from megatron_tokenformer.config.load import validate
from megatron_tokenformer.config.schema import Model, RunConfig
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.model.language_model import full_shapes

SPARE_BYTES = 16 * 1024 * 1024
"""room that is asked for beyond the numbers themselves: headers, the manifest, folders"""


@dataclass(frozen=True)
class NewRows:
    """The rows of one parameter that the old model does not have."""

    name: str
    rows: range
    width: int


@dataclass(frozen=True)
class GrowthPlan:
    """A growth that can be carried out."""

    source: Path
    folder: Path
    """where the grown checkpoint goes, beside `latest`"""
    old: Manifest
    before: Model
    target: RunConfig
    rule: Growth
    added: list[NewRows]
    link: bool
    """hard-link the old shards, where the file system can"""
    verify: bool
    """read what is linked, to check its hash (what is copied is always checked)"""

    @property
    def states(self) -> list[str]:
        """What the grown checkpoint stores of each parameter."""
        return [WEIGHT] if self.rule.optimizer == "reset" else self.old.states

    @property
    def rewrites(self) -> bool:
        """Whether the old shards change, so that they can be neither copied as bytes nor linked."""
        return self.states != self.old.states or self.rule.old_token_noise > 0

    @property
    def old_bytes(self) -> int:
        """Size of the shards that hold the old rows, in the grown checkpoint."""
        stored = sum(shard.size for shard in self.old.shards)
        return stored * len(self.states) // len(self.old.states)

    @property
    def new_bytes(self) -> int:
        """Size of the new rows, in all states."""
        return 4 * len(self.states) * sum(len(added.rows) * added.width for added in self.added)

    @property
    def one_file_system(self) -> bool:
        """Whether source and target are on one file system, so that links are possible."""
        return self.source.stat().st_dev == _nearest_folder(self.folder).stat().st_dev

    @property
    def free_bytes(self) -> int:
        """Free space on the disk of the target."""
        return shutil.disk_usage(_nearest_folder(self.folder)).free

    def needed_bytes(self, link: bool) -> int:
        """Space that the grown checkpoint takes."""
        return (0 if link else self.old_bytes) + self.new_bytes


def plan_growth(
    source: Path, target: RunConfig, folder: Path, rule: Growth, link: bool = False, verify: bool = True
) -> GrowthPlan:
    """Check that a checkpoint can grow to the token counts of `target.model`; writes nothing.

    Raises:
        UserError: the models differ in more than tokens, the manifest is damaged, the folder is that of a
            run, or nothing could be linked.
    """
    old = read_manifest(source)
    before = validate(Model, old.config.get("model", {}), str(source))
    check_growth(before, target.model, rule)
    if link and (rule.optimizer == "reset" or rule.old_token_noise > 0):
        raise UserError(
            "--link keeps the old shards as they are, --optimizer reset and --old-token-noise change them; "
            "leave one out"
        )
    others = [path.name for path in store.complete_checkpoints(folder) if path.name != store.step_name(0)]
    if others:
        raise UserError(f"{folder} holds {others[-1]}, so it is a run's; grow into a folder of its own")
    added = [
        NewRows(name, range(old.shapes[name][0], shape[0]), shape[1])
        for name, shape in full_shapes(target.model).items()
        if list(shape) != old.shapes[name]
    ]
    return GrowthPlan(source, folder, old, before, target, rule, added, link, verify)


def check_space(plan: GrowthPlan, link: bool) -> None:
    """Refuse a growth for which the disk has no room.

    Raises:
        UserError: with what is needed and what is free.
    """
    needed, free = plan.needed_bytes(link) + SPARE_BYTES, plan.free_bytes
    if needed > free:
        raise UserError(
            f"cannot grow {plan.source} into {plan.folder}: it takes {in_bytes(needed)}, and there "
            f"{in_bytes(free)} are free; make room or give another --save",
            exit_code=1,
        )


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
