"""Pipeline stages: cut as evenly as can be, the head counted; the bubble against a schedule played out."""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path
from random import Random

import pytest

from megatron_tokenformer.config.load import load_config
from megatron_tokenformer.config.pipeline_cut import (
    bubble_share,
    describe_pipeline,
    pipeline_work,
    slowest_share,
    split_evenly,
    stage_layers,
    stage_works,
)

CONFIGS = Path(__file__).parents[2] / "configs"


def sums(work: tuple[int, ...], bounds: tuple[int, ...]) -> list[int]:
    return [sum(work[first:end]) for first, end in pairwise(bounds)]


@pytest.mark.parametrize("seed", range(30))
def test_no_cut_is_more_even(seed: int) -> None:
    """Against all cuts there are."""
    random = Random(seed)
    work = tuple(random.choice([0, 0, 1, 3, 3, 3, 7]) for _ in range(random.randint(4, 11)))
    parts = random.randint(1, min(5, len(work)))
    cuts = [(0, *inner, len(work)) for inner in combinations(range(1, len(work)), parts - 1)]
    best = min(
        cuts, key=lambda bounds: (max(sums(work, bounds)), sum(s**2 for s in sums(work, bounds)), bounds)
    )
    assert split_evenly(work, parts) == best


@pytest.mark.parametrize("path", CONFIGS.glob("*.yaml"), ids=lambda path: path.stem)
@pytest.mark.parametrize("stages", [2, 3, 4, 8, 12])
def test_stages_of_every_config(path: Path, stages: int) -> None:
    config = load_config(path, [f"parallel.pipeline={stages}"])
    layers, works = stage_layers(config), stage_works(config)
    assert sum(layers) == config.model.layers and sum(works) == sum(pipeline_work(config))
    assert all(works), "no stage is idle"
    by_number = split_evenly((0,) + (1,) * config.model.layers + (0,) * 3, stages)
    assert max(works) <= max(sums(pipeline_work(config), by_number)), "better than by number of layers"


def test_the_head_of_a_small_model_is_worth_several_layers() -> None:
    config = load_config(CONFIGS / "tokenformer-124m.yaml", ["parallel.pipeline=4"])
    assert stage_layers(config) == [4, 4, 4, 0]
    d, v = 768, 50304
    layer = 4 * d * (3 * 576 + 576 + 2304) + 2 * 1024 * d
    assert slowest_share(config) == pytest.approx(2 * d * v / ((12 * layer + 2 * d * v) / 4))
    assert describe_pipeline(config, 16) == (
        "stages: 4, 4, 4, 0 layers, the last with the head; the slowest has 1.16 of the mean work; "
        "16 micro-batch(es) of 8 per step and rank: the bubble is 15.8% of a step"
    )
    large = load_config(CONFIGS / "tokenformer-1.4b.yaml", ["parallel.pipeline=4"])
    assert stage_layers(large) == [3, 3, 3, 3]


def play(stages: int, micro_batches: int) -> float:
    """Share of a step that the stages wait in 1F1B, played out: forward takes 1, backward 2."""
    orders = []
    for stage in range(stages):
        ahead = min(stages - 1 - stage, micro_batches)
        order = [("forward", i) for i in range(ahead)]
        for i in range(micro_batches):
            if i + ahead < micro_batches:
                order.append(("forward", i + ahead))
            order.append(("backward", i))
        orders.append(order)
    done: dict[tuple[str, int, int], int] = {}
    free, at = [0] * stages, [0] * stages
    while any(place < len(order) for place, order in zip(at, orders)):
        for stage, order in enumerate(orders):
            while at[stage] < len(order):
                what, i = order[at[stage]]
                before = (what, stage - 1, i) if what == "forward" else (what, stage + 1, i)
                if 0 <= before[1] < stages and before not in done:
                    break
                free[stage] = max(free[stage], done.get(before, 0)) + (1 if what == "forward" else 2)
                done[what, stage, i] = free[stage]
                at[stage] += 1
    return 1 - 3 * micro_batches / max(free)


@pytest.mark.parametrize("stages, micro_batches", [(1, 4), (2, 1), (2, 8), (4, 4), (4, 16), (8, 3)])
def test_the_bubble_is_what_stages_wait(stages: int, micro_batches: int) -> None:
    assert bubble_share(stages, micro_batches) == pytest.approx(play(stages, micro_batches))
