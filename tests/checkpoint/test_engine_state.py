"""What `engine_state` reads from DeepSpeed's private names is what DeepSpeed's public functions say.

A new DeepSpeed that lays out its partitions otherwise fails here, not in somebody's checkpoint.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
import pytest
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from megatron_tokenformer.checkpoint.engine_state import adam_state, fragments
from megatron_tokenformer.checkpoint.manifest import MOMENTS, STATES, WEIGHT, Interval
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.model.language_model import canonical_parameters, full_shapes
from megatron_tokenformer.parallel.layout import Layout
from megatron_tokenformer.training.batches import pipeline_batches
from megatron_tokenformer.training.loop import train_step
from megatron_tokenformer.training.run import open_run
from tests.ranks import run_ranks
from tests.toy import toy_config

LAYOUTS = {  # processes, layout
    "data 2": (2, {}),
    "tensor 2 pipeline 2": (4, {"tensor": 2, "pipeline": 2}),
    "tensor 2 data 2": (4, {"tensor": 2}),
}
Values = dict[str, np.ndarray]


class Held(NamedTuple):
    """What one rank says of itself after two steps."""

    tensor_rank: int
    adam_step: int
    shapes: dict[str, tuple[int, ...]]
    """of the whole parameters"""
    fragments: list[tuple[Interval, Values, bool]]
    """ours: interval, states, owned"""
    parameters: dict[str, Values]
    """DeepSpeed's: by canonical name, the states of this tensor rank's part of the parameter"""


def two_steps(layout: Layout, config: RunConfig) -> Held:
    with open_run(config, layout) as run:
        batches = pipeline_batches(run.training_data, 0, config, layout, run.accumulation)
        for _ in range(2):
            train_step(run, batches)
    module, zero = run.engine.deepspeed.module, run.engine.deepspeed.optimizer
    ours = [
        (piece.interval, {key: values.numpy() for key, values in piece.states.items()}, piece.owned)
        for piece in fragments(module, zero, layout)
    ]
    theirs = {name: public_states(parameter) for name, parameter in canonical_parameters(module)}
    step = int(adam_state(zero)["step"])
    return Held(layout.tensor.rank, step, full_shapes(config.model), ours, theirs)


def public_states(parameter: Any) -> Values:
    """The three states by DeepSpeed's documented functions, which sum over data-parallel ranks."""
    moments = {key: safe_get_full_optimizer_state(parameter, key).numpy() for key in MOMENTS}
    return {WEIGHT: safe_get_full_fp32_param(parameter).numpy(), **moments}


def join_tensor_ranks(ranks: list[Held]) -> dict[str, Values]:
    """DeepSpeed's states of every whole parameter, flat; those that several ranks hold must be equal."""
    held: dict[tuple[str, str], dict[int, np.ndarray]] = defaultdict(dict)
    for rank in ranks:
        for name, states in rank.parameters.items():
            for key, values in states.items():
                assert np.array_equal(held[name, key].setdefault(rank.tensor_rank, values), values), name
    shapes = ranks[0].shapes
    assert {name for name, _ in held} == shapes.keys()
    joined: dict[str, Values] = defaultdict(dict)
    for (name, key), parts in held.items():
        rows = [parts[tensor_rank] for tensor_rank in sorted(parts)]
        whole = np.concatenate(rows) if len(shapes[name]) == 2 else rows[0]
        assert whole.shape == shapes[name]
        joined[name][key] = whole.reshape(-1)
    return joined


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def precision(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=LAYOUTS)
def ranks(
    request: pytest.FixtureRequest, precision: str, tmp_path_factory: pytest.TempPathFactory
) -> list[Held]:
    """Every rank of a run of two steps at this layout and precision."""
    world_size, parallel = LAYOUTS[request.param]
    training = {"micro_batch_size": 2, "precision": precision}
    config = toy_config(tmp_path_factory.mktemp("two-steps"), parallel=parallel, training=training)
    return run_ranks(world_size, two_steps, config, **parallel)


def test_fragments_are_what_the_public_functions_say(ranks: list[Held]) -> None:
    public = join_tensor_ranks(ranks)
    for name, states in public.items():
        assert states.keys() == set(STATES)
        assert all(values.any() for values in states.values()), f"{name} has not been trained"
    for rank in ranks:
        assert rank.adam_step == 2
        for interval, states, _ in rank.fragments:
            for key in STATES:
                expected = public[interval.name][key][interval.start : interval.stop]
                assert states[key].dtype == np.float32
                assert np.array_equal(states[key], expected), (interval, key)


def test_owned_fragments_are_every_parameter_once(ranks: list[Held]) -> None:
    owned = defaultdict(list)
    for rank in ranks:
        for interval, _, is_owned in rank.fragments:
            if is_owned:
                owned[interval.name].append((interval.start, interval.stop))
    assert owned.keys() == ranks[0].shapes.keys()
    for name, shape in ranks[0].shapes.items():
        starts, stops = zip(*sorted(owned[name]))
        assert (0, *stops) == (*starts, math.prod(shape)), f"{name} has a gap or an overlap"
