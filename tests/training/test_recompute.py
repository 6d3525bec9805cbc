"""Recomputing layers in the backward pass changes nothing but memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.model.tokenformer import TokenformerLayer
from megatron_tokenformer.parallel.layout import Layout
from megatron_tokenformer.training.loop import train
from megatron_tokenformer.training.metrics import read_rows
from tests.ranks import run_ranks
from tests.toy import toy_config


def train_and_count(layout: Layout, config: RunConfig) -> int:
    """Train; return how many times a layer ran forward."""
    calls = []

    def count(module: nn.Module, *_: object) -> None:
        if isinstance(module, TokenformerLayer):
            calls.append(module)

    register_module_forward_hook(count)
    train(config, layout)
    return len(calls)


@pytest.mark.parametrize("world_size, parallel", [(1, {}), (2, {"tensor": 2}), (2, {"pipeline": 2})])
def test_losses_are_bit_identical(tmp_path: Path, world_size: int, parallel: dict[str, int]) -> None:
    found, calls = [], []
    for recompute in ("none", "layer"):
        config = toy_config(
            tmp_path, parallel=parallel, training={"recompute": recompute, "steps": 4, "micro_batch_size": 2}
        )
        config = config.model_copy(update={"run_dir": str(tmp_path / recompute)})
        calls.append(sum(run_ranks(world_size, train_and_count, config, **parallel)))
        found.append([row.get("loss") for row in read_rows(tmp_path / recompute / "metrics.jsonl")])
    assert found[0] == found[1]
    assert calls[1] > 1.3 * calls[0], "the backward pass ran the layers again"
