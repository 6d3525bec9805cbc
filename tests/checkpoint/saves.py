"""Saves of a small state by the real saver, without a model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_tokenformer.checkpoint.engine_state import Fragment
from megatron_tokenformer.checkpoint.manifest import STATES, Interval, Manifest, read_manifest
from megatron_tokenformer.checkpoint.saving import Saver
from megatron_tokenformer.checkpoint.shards import IntervalReader, verify_shard
from megatron_tokenformer.config.schema import Checkpoint
from megatron_tokenformer.parallel.layout import Layout

TENSORS = [f"tensor-{number}" for number in range(8)]
WIDTH = 4096


def state(layout: Layout, value: float = 0.0) -> list[Fragment]:
    """Every rank's rows of a few tensors, all of one value."""
    rows = range(layout.rank * WIDTH, (layout.rank + 1) * WIDTH)
    return [
        Fragment(
            Interval(name, rows.start, rows.stop),
            {key: torch.full((WIDTH,), value) for key in STATES},
            offset=WIDTH * number,
            owned=True,
        )
        for number, name in enumerate(TENSORS)
    ]


def fill(fragments: list[Fragment], value: float) -> None:
    """What a training step would do."""
    for fragment in fragments:
        for values in fragment.states.values():
            values.fill_(value)


def manifest(layout: Layout, step: int) -> Manifest:
    """Of `state` on all ranks."""
    tau = {"start": 1.0, "end": 1.0, "steps": 0}
    return Manifest(
        config={},
        step=step,
        position=0,
        adam_step=step,
        taus={role: tau for role in ("qkv", "output", "ffn")},
        shapes={name: [layout.processes.world_size, WIDTH] for name in TENSORS},
        states=list(STATES),
        shards=[],
    )


def open_saver(layout: Layout, folder: Path, say: Callable[[str], None], **settings: Any) -> Saver:
    """A saver as a run has one."""
    return Saver(folder, Checkpoint(**settings), layout, say)


def stored_value(checkpoint: Path) -> float:
    """The value that all elements of a checkpoint have, read with every check there is."""
    there = read_manifest(checkpoint)
    for shard in there.shards:
        verify_shard(checkpoint, shard, there.states, lambda _: None)
    reader = IntervalReader(checkpoint, there)
    found = {
        value
        for name, shape in there.shapes.items()
        for key in STATES
        for _, values in reader.read(Interval(name, 0, math.prod(shape)), key)
        for value in values.unique().tolist()
    }
    assert len(found) == 1, found
    return found.pop()
