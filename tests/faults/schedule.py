"""The demo's schedule with smaller steps, for those who disturb it, and what it comes to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_tokenformer.checkpoint.manifest import read_manifest
from megatron_tokenformer.checkpoint.store import find_checkpoint
from megatron_tokenformer.metrics_file import read_rows
from tests.faults.processes import ROOT

SCHEDULE = ROOT / "configs/progressive/demo.yaml"
STAGES = ("tokens-32", "tokens-64", "tokens-128", "tokens-256")


def overrides(folder: Path, prefix: str, **changes: Any) -> list[str]:
    """Arguments of the stage machine that make a schedule in `folder` of 24 steps a stage."""
    sizes = {
        "run_dir": folder,
        "common.data.train": prefix,
        "common.data.validation": prefix,
        "common.data.sequence_length": 64,
        "common.training.steps": 24,
        "common.training.eval_interval": 8,
        "common.training.micro_batch_size": 4,
        "common.training.log_interval": 1,
        "common.checkpoint.interval": 4,
        **changes,
    }
    return [f"{key}={value}" for key, value in sizes.items()]


def has_stepped(folder: Path, before: dict[str, int]) -> bool:
    """Whether some stage has logged more than it had; a run that goes on first drops rows."""
    return any(size > before[stage] for stage, size in logged_bytes(folder).items())


def logged_bytes(folder: Path) -> dict[str, int]:
    """Bytes of what each stage has logged."""
    found = {}
    for stage in STAGES:
        path = folder / stage / "metrics.jsonl"
        found[stage] = path.stat().st_size if path.exists() else 0
    return found


def results(folder: Path) -> dict[str, Any]:
    """What every stage came to: its losses, and hashes of all its last weights and moments."""
    found: dict[str, Any] = {}
    for stage in STAGES:
        rows = read_rows(folder / stage / "metrics.jsonl")
        losses = [(row["step"], row.get("loss"), row.get("grad_norm"), row.get("val_loss")) for row in rows]
        manifest = read_manifest(find_checkpoint(folder / stage))
        found[stage] = (losses, manifest.position, [shard.hash for shard in manifest.shards])
    return found
