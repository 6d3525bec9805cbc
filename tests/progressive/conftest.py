"""A small schedule of three stages, as a mapping to change and as a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Tree = dict[str, Any]


def tokens(qkv: int) -> Tree:
    return {"tokens": {"qkv": qkv, "output": qkv, "ffn": 4 * qkv}}


@pytest.fixture
def schedule(tmp_path: Path) -> Tree:
    """Stages a, b, c of 8, 16 and 32 tokens, on 2 processes."""
    return {
        "run_dir": str(tmp_path / "run"),
        "launch": {"processes_per_node": 2},
        "common": {
            "model": {"layers": 2, "hidden_size": 16, "attention_heads": 2, "vocab_size": 64},
            "data": {"train": "some/prefix", "validation": "some/other", "sequence_length": 8},
            "training": {"steps": 4, "global_batch_size": 8, "micro_batch_size": 2},
        },
        "stages": [
            {"name": "a", "config": {"model": tokens(8)}},
            {"name": "b", "config": {"model": tokens(16), "parallel": {"tensor": 2}}},
            {"name": "c", "config": {"model": tokens(32), "parallel": {"pipeline": 2}}},
        ],
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Tree], Path]:
    """Write a schedule and return its path."""

    def to_file(tree: Tree) -> Path:
        path = tmp_path / "schedule.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return to_file
