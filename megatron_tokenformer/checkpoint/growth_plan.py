"""What a growth will read, link and write, and whether the disk has room for it: known before it begins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_tokenformer.checkpoint.resize import ResizePlan, check_folder, read_source
from megatron_tokenformer.config.growth import Growth, check_growth
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.model.language_model import full_shapes

OldRows = Literal["linked", "copied", "rewritten"]


@dataclass(frozen=True)
class NewRows:
    """The rows of one parameter that the old model does not have."""

    name: str
    rows: range
    width: int


@dataclass(frozen=True)
class GrowthPlan(ResizePlan):
    """A growth that can be carried out."""

    rule: Growth
    added: list[NewRows]
    link: bool
    """hard-link the old shards, where the file system can"""
    verify: bool
    """read what is linked, to check its hash (what is copied is always checked)"""

    kind = "growth"
    verb = "grow"

    @property
    def rewrites(self) -> bool:
        """Whether the old shards change, so that they can be neither copied as bytes nor linked."""
        return self.states != self.old.states or self.rule.old_token_noise > 0

    @property
    def old_bytes(self) -> int:
        """Size of the shards that hold the old rows, in the grown checkpoint."""
        return self.stored_bytes * len(self.states) // len(self.old.states)

    @property
    def new_bytes(self) -> int:
        """Size of the new rows, in all states."""
        rows = sum(len(added.rows) * added.width for added in self.added)
        return 4 * len(self.states) * rows

    @property
    def will_link(self) -> bool:
        """Whether the old shards will be linked, as far as can be told."""
        return self.link and self.one_file_system

    @property
    def old_rows(self) -> OldRows:
        """What becomes of the shards that hold the old rows."""
        return "rewritten" if self.rewrites else "linked" if self.will_link else "copied"

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
    old, before = read_source(source)
    rule = rule.in_a_stage_of(target.training.steps)
    check_growth(before, target.model, rule)
    if link and (rule.optimizer == "reset" or rule.old_token_noise > 0):
        raise UserError(
            "--link keeps the old shards as they are, --optimizer reset and --old-token-noise change them; "
            "leave one out"
        )
    check_folder(source, folder, GrowthPlan.verb)
    added = [
        NewRows(name, range(old.shapes[name][0], shape[0]), shape[1])
        for name, shape in full_shapes(target.model).items()
        if list(shape) != old.shapes[name]
    ]
    return GrowthPlan(source.absolute(), folder, old, before, target, rule, added, link, verify)
