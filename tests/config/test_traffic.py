"""The traffic estimate against the collectives that running engines call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from deepspeed.comm import comm

from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.config.traffic import (
    Transfer,
    data_transfers,
    pipeline_transfers,
    tensor_transfers,
)
from megatron_tokenformer.parallel.layout import Layout
from megatron_tokenformer.training.batches import pipeline_batches
from megatron_tokenformer.training.loop import train_step
from megatron_tokenformer.training.run import open_run
from tests.ranks import run_ranks
from tests.toy import toy_config

# The argument that is the whole tensor of the call.
CALLS = {
    "all_reduce": ("all_reduce", 0),
    "all_gather_into_tensor": ("all_gather", 0),
    "reduce_scatter_tensor": ("reduce_scatter", 1),
    "send": ("send", 0),
}
SMALL = 200
"""bytes; below are DeepSpeed's sums of losses and norms, which the estimate leaves out"""

Sizes = Counter[tuple[str, int]]


def count_calls(layout: Layout, config: RunConfig) -> tuple[Sizes, Sizes]:
    """(kind, bytes) of one step's calls: within the tensor-parallel group, and in all other groups."""
    tensor, others = Counter(), Counter()

    def counted(kind: str, place: int, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            group = named.get("group") or next(
                (a for a in arguments if isinstance(a, dist.ProcessGroup)), None
            )
            names = ("tensor", "output_tensor", "output")
            whole = (
                arguments[place] if len(arguments) > place else next(named[n] for n in names if n in named)
            )
            if kind == "send" or dist.get_world_size(group) > 1:
                (tensor if group is layout.tensor.group else others)[kind, whole.nbytes] += 1
            return call(*arguments, **named)

        return wrapped

    with open_run(config, layout) as run:
        batches = pipeline_batches(run.training_data, 0, config, layout, run.accumulation, None)
        train_step(run, batches)  # the first step also tells shapes
        plain = {name: getattr(dist, name) for name in CALLS}
        for name, (kind, place) in CALLS.items():
            setattr(dist, name, counted(kind, place, plain[name]))
        # DeepSpeed looked this one up when it started.
        comm.cdb.all_gather_function = dist.all_gather_into_tensor
        train_step(run, batches)
        comm.cdb.all_gather_function = plain["all_gather_into_tensor"]
        for name, call in plain.items():
            setattr(dist, name, call)
    return tensor, others


def by_size(transfers: Iterable[Transfer]) -> Sizes:
    sizes: Sizes = Counter()
    for transfer in transfers:
        sizes[transfer.kind, transfer.size] += transfer.calls
    return sizes


@pytest.mark.parametrize("recompute", ["none", "layer"])
@pytest.mark.parametrize(
    "sequence, pipeline, score_norm",
    [
        (False, 1, "l2_norm_gelu"),
        (False, 2, "l2_norm_gelu"),
        (True, 1, "l2_norm_gelu"),
        (True, 2, "l2_norm_gelu"),
        (False, 1, "softmax"),  # which also needs the ranks' maxima
    ],
)
def test_tensor_parallel_calls(
    tmp_path: Path, sequence: bool, pipeline: int, recompute: str, score_norm: str
) -> None:
    parallel = {"tensor": 2, "sequence": sequence, "pipeline": pipeline}
    training = {"micro_batch_size": 2, "recompute": recompute, "precision": "bf16", "steps": 2}
    config = toy_config(tmp_path, model={"score_norm": score_norm}, parallel=parallel, training=training)
    for rank, (measured, _) in enumerate(run_ranks(2 * pipeline, count_calls, config, **parallel)):
        assert measured == by_size(tensor_transfers(config, rank // 2, micro_batches=4))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("pipeline, data", [(1, 2), (2, 1), (2, 2)])
def test_data_and_pipeline_parallel_calls(tmp_path: Path, precision: str, pipeline: int, data: int) -> None:
    parallel = {"pipeline": pipeline}
    training = {"micro_batch_size": 2, "precision": precision, "steps": 2}
    config = toy_config(tmp_path, parallel=parallel, training=training)
    for rank, (_, others) in enumerate(run_ranks(pipeline * data, count_calls, config, **parallel)):
        stage, micro_batches = rank // data, 4 // data
        expected = by_size(
            data_transfers(config, stage, data) + pipeline_transfers(config, stage, micro_batches)
        )
        assert {call: count for call, count in others.items() if call[1] > SMALL} == expected


def test_a_ring_sends_what_it_must() -> None:
    """Each of 4 ranks passes on 3 quarters; an all-reduce is a scatter and a gather."""
    assert Transfer("all_gather", 4, calls=2, size=100).sent == 150
    assert Transfer("reduce_scatter", 4, calls=1, size=100).sent == 75
    assert Transfer("all_reduce", 4, calls=1, size=100).sent == 150


def test_growth_adds_no_tensor_parallel_traffic(tmp_path: Path) -> None:
    few, many = (
        toy_config(tmp_path, model={"tokens": {"qkv": n, "output": n, "ffn": 4 * n}}, parallel={"tensor": 2})
        for n in (576, 9216)
    )
    assert tensor_transfers(few, 0, 4) == tensor_transfers(many, 0, 4)
