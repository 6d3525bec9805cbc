"""What real steps exchange, counted at torch's dispatcher, against the formulas of docs/parallelism.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from megatron_tokenformer.config import traffic
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.parallel.layout import Layout
from megatron_tokenformer.parallel.traffic import SCALARS, count_traffic
from megatron_tokenformer.training.batches import pipeline_batches
from megatron_tokenformer.training.loop import train_step
from megatron_tokenformer.training.run import open_run
from tests.ranks import run_ranks
from tests.toy import DENSE, toy_config, write_documents

Counted = dict[tuple[str, str], traffic.Traffic]
LADDER = (576, 2144, 4864, 9216)


def count_steps(layout: Layout, configs: list[RunConfig]) -> list[Counted]:
    """The second step of each run: in the first, pipeline stages also tell each other what they will send."""
    get_accelerator().is_fp16_supported = lambda: True  # this processor can; DeepSpeed does not believe it
    counted = []
    for config in configs:
        with open_run(config, layout) as run:
            batches = pipeline_batches(run.training_data, 0, config, layout, run.accumulation, run.eod_id)
            train_step(run, batches)
            with count_traffic(layout) as calls:
                train_step(run, batches)
            counted.append(traffic.total(calls))
    return counted


def small(folder: Path, name: str, parallel: dict[str, Any], **sections: dict[str, Any]) -> RunConfig:
    """Two micro-batches of two sequences on each of the data-parallel ranks."""
    training = {
        "precision": "bf16",
        "micro_batch_size": 2,
        "global_batch_size": 4,
        **sections.pop("training", {}),
    }
    config = toy_config(folder, parallel=parallel, training=training, **sections)
    return config.model_copy(update={"run_dir": str(folder / name)})


def step_traffic(config: RunConfig, precision: str, data_size: int, stage: int = 0) -> Counted:
    """By the formulas: what a rank of a pipeline stage exchanges in one step, but for scalars."""
    micro_batches = config.training.global_batch_size // (config.training.micro_batch_size * data_size)
    each, once = traffic.stage_traffic(config, precision, data_size, stage)
    return traffic.total([*(one.times(micro_batches) for one in each), *once])


def without_scalars(counted: Counted) -> Counted:
    """What the formulas are about; the scalars of a step must be few."""
    assert sum(t.bytes for t in counted.values() if t.purpose == SCALARS) <= 64
    return {key: t for key, t in counted.items() if t.purpose != SCALARS}


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize("sequence", [False, True])
def test_a_tensor_parallel_step(tmp_path: Path, tensor: int, sequence: bool, precision: str) -> None:
    parallel = {"tensor": tensor, "sequence": sequence}
    configs = [
        small(tmp_path, recompute, parallel, training={"recompute": recompute, "precision": precision})
        for recompute in ("none", "scores", "layer")
    ]
    for rank in run_ranks(tensor, count_steps, configs, **parallel):
        for counted, config in zip(rank, configs):
            assert without_scalars(counted) == step_traffic(config, precision, data_size=1)


def test_a_layer_by_hand(tmp_path: Path) -> None:
    """The counter and the formulas might share a mistake: here the numbers of one case are written out."""
    parallel = {"tensor": 2, "sequence": False}
    config = small(tmp_path, "run", parallel, model={"layers": 3})
    positions, width, micro_batches, layers = 2 * 32, 32, 2, 3
    x = positions * width * 2  # bf16
    expected = {
        # Out of attention, out of the FFN and their inputs' gradients; embedding and head.
        ("activations", "all-reduce"): (4 * layers + 2, (4 * layers + 2) * x),
        # Heads into output, and the gradients of q, k, v.
        ("activations", "all-gather"): (2 * layers, (1 + 3) * layers * x),
        # q, k, v onto heads, and the gradient of the heads.
        ("activations", "reduce-scatter"): (2 * layers, (3 + 1) * layers * x),
        # Five Pattentions, three of which share a call; there and back; fp32.
        ("row totals", "all-reduce"): (2 * 3 * layers, 2 * 5 * layers * positions * 4),
        ("loss", "all-reduce"): (3, 3 * positions * 4),
    }
    for (counted,) in run_ranks(2, count_steps, [config], **parallel):
        found = {key: (t.calls, t.bytes) for key, t in without_scalars(counted).items()}
        assert found == {
            key: (micro_batches * n, micro_batches * size) for key, (n, size) in expected.items()
        }


@pytest.mark.parametrize("sequence", [False, True])
def test_traffic_does_not_grow_with_the_model(tmp_path: Path, sequence: bool) -> None:
    """The token counts of the 124M to 1.4B ladder, on a narrow model."""
    parallel = {"tensor": 2, "sequence": sequence}
    configs = [
        small(
            tmp_path,
            str(n),
            parallel,
            model={"layers": 1, "tokens": {"qkv": n, "output": n, "ffn": 4 * n}},
            data={"sequence_length": 16},
        )
        for n in LADDER
    ]
    for counted in run_ranks(2, count_steps, configs, **parallel):
        assert all(other == counted[0] for other in counted[1:])
        assert without_scalars(counted[0]) == step_traffic(configs[-1], "bf16", data_size=1)


@pytest.mark.parametrize("score_norm", ["gelu_l2_norm", "softmax"])
def test_the_other_score_norms(tmp_path: Path, score_norm: str) -> None:
    config = small(tmp_path, "run", {"tensor": 2}, model={"score_norm": score_norm})
    for (counted,) in run_ranks(2, count_steps, [config], tensor=2):
        assert without_scalars(counted) == step_traffic(config, "bf16", data_size=1)


@pytest.mark.parametrize(
    "precision, tensor, pipeline, data, sequence, recompute",
    [
        ("bf16", 2, 1, 1, False, "none"),
        ("fp32", 4, 1, 1, True, "layer"),
        ("bf16", 2, 2, 1, True, "none"),
        ("bf16", 1, 2, 2, False, "none"),
    ],
)
def test_the_dense_twin(
    tmp_path: Path, precision: str, tensor: int, pipeline: int, data: int, sequence: bool, recompute: str
) -> None:
    parallel = {"tensor": tensor, "pipeline": pipeline, "sequence": sequence}
    training = {"precision": precision, "global_batch_size": 4 * data, "recompute": recompute}
    config = small(tmp_path, "run", parallel, model={**DENSE, "layers": 4}, training=training)
    ranks = run_ranks(tensor * pipeline * data, count_steps, [config], **parallel)
    for rank, (counted,) in enumerate(ranks):
        expected = step_traffic(config, precision, data, stage=rank // (tensor * data))
        assert without_scalars(counted) == expected


def test_a_dense_layer_by_hand(tmp_path: Path) -> None:
    config = small(tmp_path, "run", {"tensor": 2}, model={**DENSE, "layers": 3})
    positions, micro_batches, layers = 2 * 32, 2, 3
    x = positions * 32 * 2  # bf16
    calls = 4 * layers + 2  # into and out of attention and MLP, of which half in backward; embedding and head
    for (counted,) in run_ranks(2, count_steps, [config], tensor=2):
        found = {key: (t.calls, t.bytes) for key, t in without_scalars(counted).items()}
        assert found == {
            ("activations", "all-reduce"): (micro_batches * calls, micro_batches * calls * x),
            ("loss", "all-reduce"): (micro_batches * 3, micro_batches * 3 * positions * 4),
        }


@pytest.mark.parametrize(
    "precision, tensor, pipeline, data, sequence, isolate",
    [
        ("fp32", 1, 1, 3, False, False),  # the parameters are not a multiple of the ranks
        ("bf16", 1, 1, 3, False, False),
        ("fp32", 1, 2, 2, False, True),
        ("fp16", 1, 2, 2, False, False),
        ("bf16", 2, 2, 1, True, True),
        ("bf16", 1, 4, 1, False, False),  # has stages that are neither first nor last, and uneven ones
    ],
)
def test_pipeline_and_data_parallel_steps(
    tmp_path: Path, precision: str, tensor: int, pipeline: int, data: int, sequence: bool, isolate: bool
) -> None:
    parallel = {"tensor": tensor, "pipeline": pipeline, "sequence": sequence}
    prefix = write_documents(tmp_path, "documents")
    config = small(
        tmp_path,
        "run",
        parallel,
        model={"layers": 4},
        data={"train": prefix, "validation": [], "isolate_documents": isolate, "eod_id": 0},
        training={"precision": precision, "global_batch_size": 4 * data},
    )
    ranks = run_ranks(tensor * pipeline * data, count_steps, [config], **parallel)
    for rank, (counted,) in enumerate(ranks):
        stage = rank // (tensor * data)
        expected = step_traffic(config, precision, data, stage=stage)
        assert without_scalars(counted) == expected


def count_calls_of_others(layout: Layout) -> tuple[Counted, str]:
    """Collectives that are not ours, and one that the counter would not see."""
    x = torch.ones(6)
    with count_traffic(layout) as calls:
        dist.broadcast(x, src=0)
        dist.all_gather([torch.empty(6) for _ in range(2)], x, group=layout.tensor.group)
        dist.barrier()
    with pytest.raises(NotImplementedError) as refused, count_traffic(layout):
        torch.ops._c10d_functional.all_reduce(x, "sum", layout.tensor.group.group_name)
    dist.all_reduce(x)  # nobody counts
    return traffic.total(calls), str(refused.value)


def test_whoever_calls_is_counted_or_refused() -> None:
    for counted, refused in run_ranks(2, count_calls_of_others, tensor=2):
        assert {(kind, t.bytes, t.calls) for (_, kind), t in counted.items()} == {
            ("broadcast", 24, 1),
            ("all-gather", 48, 1),
        }
        assert "not counted" in refused


def test_one_process_exchanges_nothing(tmp_path: Path) -> None:
    ((counted,),) = run_ranks(1, count_steps, [small(tmp_path, "run", {})])
    assert counted == {}


def test_bytes_sent_by_a_ring() -> None:
    sent = {
        kind: traffic.Traffic("x", kind, 4, 800).sent
        for kind in ("all-reduce", "all-gather", "send", "receive")
    }
    assert sent == {"all-reduce": 1200, "all-gather": 600, "send": 800, "receive": 0}


@pytest.mark.parametrize(
    "layers, width, ratio", [(12, 768, 1 / 2), (24, 1024, 4 / 3), (24, 1536, 2), (24, 2048, 8 / 3)]
)
@pytest.mark.parametrize("sequence", [False, True])
def test_against_the_gpt_of_equal_size(layers: int, width: int, ratio: float, sequence: bool) -> None:
    """docs/parallelism.md: twice the activations per layer, of fewer and narrower layers."""
    if sequence:  # beside 8 x a GPT's layer sums the gradients of two norms over ranks, 8 vectors of x / 1024
        ratio *= 1 + 1 / 1024
    gpt = layers * traffic.sent(traffic.passes(traffic.transformer_rows(width, 1024, 2, sequence), ranks=8))
    rows = traffic.tokenformer_rows(768, 1024, 2, sequence)
    ours = 12 * traffic.sent(traffic.passes(rows, ranks=8))
    totals = 12 * traffic.sent(traffic.passes([r for r in rows if r.purpose == traffic.ROW_TOTALS], ranks=8))
    assert gpt / (ours - totals) == pytest.approx(ratio)
    assert totals / ours == pytest.approx(80 / (16 * 768 * 2 + 80))
