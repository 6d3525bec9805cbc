"""The order is a bijection that looks random, the blend keeps its weights, and neither may ever change."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tokenformer.data.order import BLOCK, BlendTable, apportion, permute
from megatron_tokenformer.errors import UserError


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 300), seed=st.integers(), epoch=st.integers(0))
def test_permute_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    assert sorted(permute(i, size, seed, epoch) for i in range(size)) == list(range(size))


@given(size=st.integers(1, 1 << 60), data=st.data())
def test_permute_stays_in_range_at_any_size(size: int, data: st.DataObject) -> None:
    assert 0 <= permute(data.draw(st.integers(0, size - 1)), size, 1, 2) < size


@pytest.mark.parametrize("size", [10, 1_000, 16_384, 16_385])
def test_permute_looks_random(size: int) -> None:
    """Index and place correlate over seeds as in true shuffles: mean 0, deviation 1/sqrt(n-1)."""
    places = np.arange(size)
    seeds = range(100 if size <= 1_000 else 8)
    found = [np.corrcoef(places, [permute(i, size, seed, 0) for i in range(size)])[0, 1] for seed in seeds]
    expected = 1 / math.sqrt(size - 1)
    assert abs(np.mean(found)) < 4 * expected / math.sqrt(len(found))
    assert 0.4 * expected < np.std(found) < 1.8 * expected


def test_each_epoch_and_each_seed_has_its_own_order() -> None:
    orders = {
        tuple(permute(i, 50, seed, epoch) for i in range(50)) for seed in (0, 1, -1) for epoch in (0, 1, 2)
    }
    assert len(orders) == 9


@pytest.mark.parametrize("index", [-1, 10])
def test_permute_refuses_an_index_outside(index: int) -> None:
    with pytest.raises(ValueError, match="range"):
        permute(index, 10, 0, 0)


weights = st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=12)


@given(weights)
def test_apportion_gives_every_place_to_somebody(values: list[float]) -> None:
    counts = apportion(values)
    assert sum(counts) == BLOCK
    assert min(counts) >= 1
    exact = [value / math.fsum(values) * BLOCK for value in values]
    rounded_up = sum(share < 1 for share in exact)
    assert all(abs(count - share) < 1 + rounded_up + 1e-3 for count, share in zip(counts, exact, strict=True))


@given(weights, st.integers(0, 3 * BLOCK))
@settings(max_examples=40, deadline=None)
def test_every_prefix_keeps_the_weights(values: list[float], length: int) -> None:
    table = BlendTable(values)
    seen = np.zeros(len(values))
    for source, count in enumerate(table.counts):
        whole, rest = divmod(length, BLOCK)
        seen[source] = whole * count + np.count_nonzero(table._sources[:rest] == source)
    shares = np.array(table.counts) / BLOCK
    assert (abs(seen - length * shares) <= 1 + len(values) * shares).all()


def test_locate_counts_each_source_without_a_gap() -> None:
    table = BlendTable([0.7, 0.2, 0.1])
    following = [0, 0, 0]
    for position in range(2 * BLOCK + 100):
        source, index = table.locate(position)
        assert index == following[source]
        following[source] += 1
    with pytest.raises(ValueError, match="negative"):
        table.locate(-1)


def test_only_the_ratio_of_weights_matters() -> None:
    assert apportion([3, 1]) == apportion([0.75, 0.25]) == [49_152, 16_384]


@pytest.mark.parametrize("bad", [0, -1, math.nan, math.inf])
def test_bad_weights_are_refused(bad: float) -> None:
    with pytest.raises(UserError, match="not a positive number"):
        apportion([1, bad])


def test_too_few_and_too_many_sources_are_refused() -> None:
    with pytest.raises(UserError, match="at least one"):
        apportion([])
    with pytest.raises(UserError, match="at most"):
        apportion([1] * (BLOCK + 1))
    assert apportion([1] * BLOCK) == [1] * BLOCK


def test_the_order_of_all_runs_is_what_it_always_was() -> None:
    """If this fails, resumed runs would see other data: do not change the numbers, change the code back."""
    assert [permute(i, 10, 0, 0) for i in range(10)] == [9, 7, 5, 3, 6, 1, 4, 8, 2, 0]
    assert [permute(i, 1_000, 1234, 5) for i in range(8)] == [236, 499, 910, 415, 41, 708, 594, 473]
    table = BlendTable([0.5, 0.3, 0.2])
    assert [table.locate(i)[0] for i in range(10)] == [0, 1, 2, 0, 1, 0, 0, 2, 1, 0]
