"""Recomputing layers or scores in the backward pass changes nothing but memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.metrics_file import read_rows
from megatron_tokenformer.model import pattention
from megatron_tokenformer.model.tokenformer import TokenformerLayer
from megatron_tokenformer.parallel.layout import Layout
from megatron_tokenformer.training.loop import train
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


def train_in_chunks(layout: Layout, config: RunConfig) -> list[bool]:
    """Train, two chunks to a micro-batch; return whether each Pattention was told to recompute its scores."""
    told, whole = [], pattention.pattend

    def chunked(*arguments: Any) -> Any:
        told.append(arguments[-1])
        return whole(*arguments, chunk_scores=1)  # 128 rows, the least

    pattention.pattend = chunked
    train(config, layout)
    return told


CHUNKED_LAYOUTS = [
    (1, {}),
    (2, {"tensor": 2}),
    (2, {"tensor": 2, "sequence": True}),
    (2, {"pipeline": 2}),
    (2, {}),
]


@pytest.mark.parametrize("world_size, parallel", CHUNKED_LAYOUTS)
@pytest.mark.parametrize("score_norm", ["l2_norm_gelu", "softmax"])
def test_recomputed_scores_train_the_same_model(
    tmp_path: Path, world_size: int, parallel: dict[str, Any], score_norm: str
) -> None:
    found = {}
    for recompute in ("none", "scores"):
        training = {"recompute": recompute, "steps": 4, "global_batch_size": 16, "micro_batch_size": 8}
        config = toy_config(
            tmp_path, parallel=parallel, training=training, model={"score_norm": score_norm}
        ).model_copy(update={"run_dir": str(tmp_path / recompute)})
        told = run_ranks(world_size, train_in_chunks, config, **parallel)
        assert {choice for rank in told for choice in rank} == {recompute == "scores"}
        rows = read_rows(tmp_path / recompute / "metrics.jsonl")
        found[recompute] = [
            row[key] for row in rows for key in ("loss", "val_loss", "grad_norm") if key in row
        ]
    assert len(found["none"]) == 10  # four steps, and an evaluation at either end
    assert found["scores"] == pytest.approx(found["none"], rel=1e-6, abs=1e-6)
