"""The memory estimate of weights and optimizer against what running engines hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from memory import LiveStorages
from torch import Tensor

from megatron_tokenformer.config.activations import document_mask, layer_activations
from megatron_tokenformer.config.memory import activations, model_states
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.parallel.layout import Layout
from megatron_tokenformer.training.batches import pipeline_batches
from megatron_tokenformer.training.engine import build_engine
from megatron_tokenformer.training.loop import train_step
from megatron_tokenformer.training.run import open_run
from tests.measuring import allocated, held
from tests.ranks import run_ranks
from tests.toy import DENSE, toy_config

END = 0


def measure_states(layout: Layout, config: RunConfig) -> dict[str, int]:
    """What this rank's engine holds, seen where it holds most: before gradients are reduced, and at Adam."""
    found: dict[str, int] = {}
    with open_run(config, layout) as run:
        module, zero, adam = run.engine.deepspeed.module, run.engine.deepspeed.optimizer, run.engine.optimizer
        flat = [p for group in adam.param_groups for p in group["params"]]
        sums = getattr(zero, "fp32_groups_gradients_flat", [])

        def gradients() -> None:
            found["gradients"] = held(p.grad for p in module.parameters()) + held(sums)

        if config.training.precision == "fp32":
            reduce = zero.reduce_gradients
            zero.reduce_gradients = lambda **options: (gradients(), reduce(**options))

            adam.register_step_pre_hook(lambda *_: found.update(buffers=held(p.grad for p in flat)))
        else:
            adam.register_step_pre_hook(lambda *_: gradients())
            zero._update_hp_grad = watched(zero._update_hp_grad, found)
            run.engine.deepspeed._bf16_reduce_grads = watched(run.engine.deepspeed._bf16_reduce_grads, found)
        train_step(run, pipeline_batches(run.training_data, 0, config, layout, run.accumulation, None))
        states = [value for state in adam.state.values() for value in state.values()]
        found["weights"] = held(module.parameters())
        found["master weights"] = held(flat)
        found["moments"] = held(value for value in states if value.numel() > 1)
        return found


def watched(call: Callable[..., Any], found: dict[str, int]) -> Callable[..., Any]:
    """The same, and the most that it allocates for a moment is among the buffers."""

    def measured(*arguments: Any, **named: Any) -> None:
        _, most = allocated(lambda: [call(*arguments, **named)])
        found["buffers"] = max(most, found.get("buffers", 0))

    return measured


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("tensor, pipeline, data", [(1, 1, 1), (1, 1, 3), (2, 1, 1), (2, 2, 1), (1, 2, 2)])
def test_weights_and_optimizer_are_what_engines_hold(
    tmp_path: Path, precision: str, tensor: int, pipeline: int, data: int, dense: bool = False
) -> None:
    parallel = {"tensor": tensor, "pipeline": pipeline, "sequence": tensor > 1}
    tokens = {"qkv": 18, "output": 22, "ffn": 62}  # not of one length, and not a multiple of all ranks
    config = toy_config(
        tmp_path,
        model={"layers": 3, **(DENSE if dense else {"tokens": tokens})},
        parallel=parallel,
        training={"precision": precision, "global_batch_size": 12, "micro_batch_size": 2},
    )
    ranks = run_ranks(tensor * pipeline * data, measure_states, config, **parallel)
    for rank, measured in enumerate(ranks):
        expected = model_states(config, rank // (tensor * data), data)
        if precision == "fp32":
            measured["buffers"] += 4 * 50_000_000  # DeepSpeed's own; that it is of this size is its setting
        assert measured == expected, rank


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("tensor, pipeline", [(1, 1), (2, 2)])
def test_those_of_a_dense_model_are_too(tmp_path: Path, precision: str, tensor: int, pipeline: int) -> None:
    test_weights_and_optimizer_are_what_engines_hold(tmp_path, precision, tensor, pipeline, 1, dense=True)


def test_deepspeeds_reduction_buffer_is_of_the_size_that_is_counted(tmp_path: Path) -> None:
    """A buffer of this many elements is made in every step, whatever the model's size."""
    (sizes,) = run_ranks(1, buffers_of_a_reduction, toy_config(tmp_path))
    assert sizes == [50_000_000]


def buffers_of_a_reduction(layout: Layout, config: RunConfig) -> list[int]:
    zero = build_engine(config, layout, accumulation=8).deepspeed.optimizer
    for bucket in zero.ipg_buckets.values():
        bucket.buffer = _Remembering()
    zero.reduce_gradients(pipeline_parallel=True)
    return [size for bucket in zero.ipg_buckets.values() for size in bucket.buffer.sizes]


class _Remembering(list):  # type: ignore[type-arg]
    sizes: list[int] = []

    def append(self, buffer: Tensor) -> None:
        self.sizes.append(buffer.numel())
        super().append(buffer)


def masks_at_once(layout: Layout, config: RunConfig) -> int:
    """The most masks of isolated documents that are alive during a step."""
    found = [0]

    class Masks(LiveStorages):
        def bytes(self) -> int:
            all_of_them = super().bytes()
            sizes = [size for _, size in self.alive.values()]
            found.append(sizes.count(document_mask(config)))
            return all_of_them

    with open_run(config, layout) as run:
        batches = pipeline_batches(run.training_data, 0, config, layout, run.accumulation, END)
        with Masks([]):
            train_step(run, batches)
    return max(found)


@pytest.mark.parametrize("recompute", ["none", "layer"])
def test_a_layer_that_is_computed_again_makes_its_own_mask(tmp_path: Path, recompute: str) -> None:
    """In a step of four layers, whose masks are the only tensors of their size."""
    config = toy_config(
        tmp_path,
        model={"layers": 4},
        data={"sequence_length": 128, "isolate_documents": True, "eod_id": END},
        training={"recompute": recompute, "micro_batch_size": 3, "global_batch_size": 3},
    )
    kinds = activations(config, stage=0, micro_batches=1)
    masks = kinds["document masks"]
    if recompute == "layer":
        masks += kinds["recomputed layer"] - layer_activations(config, "none")
    (most,) = run_ranks(1, masks_at_once, config)
    assert most * document_mask(config) == masks
