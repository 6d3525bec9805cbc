"""How far a run has come: everything besides the tensors that a checkpoint must hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_tokenformer.checkpoint.manifest import Manifest
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.data.provenance import TokenizerRecord
from megatron_tokenformer.model.language_model import full_shapes
from megatron_tokenformer.model.tau import Taus, initial_taus, taus_from_json, taus_to_json
from megatron_tokenformer.parallel.layout import Layout

SETBACKS = ("skipped", "skipped_in_a_row", "rollbacks")


@dataclass
class Progress:
    """The counters of a run.  The learning rate and tau are pure functions of `step`."""

    taus: Taus
    step: int = 0
    """optimizer steps done in this run"""
    position: int = 0
    """samples seen, over this run and those that it grew from"""
    tokens: int = 0
    """tokens trained on, likewise"""
    flops: float = 0.0
    """floating-point operations spent, likewise"""
    loss: float | None = None
    val_loss: float | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    tokenizer: TokenizerRecord | None = None
    """what made the data that was seen, as far as a description ever told"""
    source_tokens: dict[str, int] = field(default_factory=dict)
    """ids in each training source, by prefix"""
    recent_losses: list[float] = field(default_factory=list)
    """of the last steps, the oldest first; what a spike is measured by"""
    skipped: int = 0
    """steps of this run that changed no weight"""
    skipped_in_a_row: int = 0
    rollbacks: int = 0
    owes_evaluation: bool = False
    """whether the run left when one was due"""

    @classmethod
    def fresh(cls, config: RunConfig) -> Progress:
        """Of a run that starts from initial values."""
        return cls(initial_taus(config.model))

    @classmethod
    def from_manifest(cls, manifest: Manifest) -> Progress:
        """Of a run that goes on from a checkpoint."""
        return cls(
            taus=taus_from_json(manifest.taus),
            step=manifest.step,
            position=manifest.position,
            tokens=int(manifest.totals["tokens"]),
            flops=manifest.totals["flops"],
            loss=manifest.loss,
            val_loss=manifest.val_loss,
            history=list(manifest.history),
            tokenizer=manifest.tokenizer,
            source_tokens=dict(manifest.source_tokens),
            recent_losses=list(manifest.recent_losses),
            owes_evaluation=manifest.owes_evaluation,
            **{name: manifest.setbacks.get(name, 0) for name in SETBACKS},
        )

    def go_back(self, manifest: Manifest) -> None:
        """To where a checkpoint of this run was."""
        for key, value in vars(Progress.from_manifest(manifest)).items():
            setattr(self, key, value)

    def manifest(self, config: RunConfig, layout: Layout) -> Manifest:
        """A manifest of this moment, without shards."""
        sizes = {
            "tensor": layout.tensor.size,
            "pipeline": layout.pipeline_size,
            "data": layout.data_size,
        }
        return Manifest(
            config=config.model_dump(mode="json"),
            step=self.step,
            position=self.position,
            adam_step=0,
            taus=taus_to_json(self.taus),
            shapes={name: list(shape) for name, shape in full_shapes(config.model).items()},
            states=[],
            shards=[],
            totals={"tokens": self.tokens, "flops": self.flops},
            loss=self.loss,
            val_loss=self.val_loss,
            layout=sizes,
            history=self.history,
            tokenizer=self.tokenizer,
            source_tokens=self.source_tokens,
            recent_losses=list(self.recent_losses),
            setbacks={name: count for name in SETBACKS if (count := getattr(self, name))},
            owes_evaluation=self.owes_evaluation,
        )
