"""A position is a sample: the same under every layout, after every resume, each window once an epoch."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tokenformer.data.batches import Blend, TokenWindows, micro_batches, open_blend
from megatron_tokenformer.data.indexed import TokenFile, TokenFileWriter
from megatron_tokenformer.data.order import BLOCK
from megatron_tokenformer.errors import UserError
from tests.descriptions import describe

SEQUENCE = 8


def write_stream(prefix: Path, tokens: int, first: int = 0) -> str:
    """A pair whose token at place i is `first + i`, so that a window tells where it is from."""
    with TokenFileWriter(str(prefix), np.dtype(np.int32)) as writer:
        writer.add(np.arange(first, first + tokens), np.array([tokens]))
        writer.finish()
    return str(prefix)


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory) -> Blend:
    folder = tmp_path_factory.mktemp("blend")
    sources = [(3.0, write_stream(folder / "a", 401)), (1.0, write_stream(folder / "b", 107, first=10_000))]
    return open_blend(sources, SEQUENCE, seed=7)


@pytest.mark.parametrize(("tokens", "windows"), [(9, 1), (16, 1), (17, 2), (24, 2), (25, 3)])
def test_windows_overlap_by_the_one_token_that_is_only_a_target(
    tmp_path: Path, tokens: int, windows: int
) -> None:
    samples = TokenWindows(write_stream(tmp_path / "a", tokens), SEQUENCE)
    assert len(samples) == windows
    for index in range(windows):
        assert samples[index].tolist() == list(range(index * SEQUENCE, index * SEQUENCE + SEQUENCE + 1))
    with pytest.raises(IndexError):
        samples[windows]


def test_too_short_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has 8 tokens; .* at least 9"):
        TokenWindows(write_stream(tmp_path / "a", 8), SEQUENCE)


def test_an_epoch_is_a_permutation_and_the_next_is_another(tmp_path: Path) -> None:
    blend = open_blend([(1.0, write_stream(tmp_path / "a", 801))], SEQUENCE, seed=1)
    epochs = [[int(blend[epoch * 100 + i][0]) // SEQUENCE for i in range(100)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3


def test_a_blend_keeps_its_weights_and_describes_itself(blend: Blend) -> None:
    from_b = sum(int(blend[position][0]) >= 10_000 for position in range(400))
    assert abs(from_b - 100) <= 2
    assert [(source.weight, source.windows, source.tokens) for source in blend.sources] == [
        (0.75, 50, 401),
        (0.25, 13, 107),
    ]


def test_any_position_can_be_read(blend: Blend) -> None:
    for position in (0, BLOCK - 1, BLOCK, 10**12):
        sample = blend[position]
        assert sample.dtype == np.int64
        assert np.diff(sample).tolist() == [1] * SEQUENCE
    with pytest.raises(ValueError, match="negative"):
        blend[-1]


def test_the_seed_changes_the_order_and_nothing_else_does(tmp_path: Path) -> None:
    sources = [(1.0, write_stream(tmp_path / "a", 801))]
    first, again, other = (open_blend(sources, SEQUENCE, seed) for seed in (1, 1, 2))
    assert all((first[i] == again[i]).all() for i in range(100))
    assert any((first[i] != other[i]).any() for i in range(100))


def test_bad_blends_are_refused(tmp_path: Path) -> None:
    prefix = write_stream(tmp_path / "a", 100)
    for sources, length, reason in (
        ([], 8, "at least one source"),
        ([(0.0, prefix)], 8, "not a positive number"),
        ([(1.0, prefix)], 0, "sequence_length"),
        ([(1.0, f"{prefix}x")], 8, "is missing"),
    ):
        with pytest.raises(UserError, match=reason):
            open_blend(sources, length, seed=0)


def test_a_larger_vocabulary_than_the_models_is_refused(tmp_path: Path) -> None:
    prefix = write_stream(tmp_path / "a", 100)
    open_blend([(1.0, prefix)], SEQUENCE, seed=0).check_vocabulary(1)
    describe(prefix, tokenizer={"vocab_size": 300})
    blend = open_blend([(1.0, prefix)], SEQUENCE, seed=0)
    blend.check_vocabulary(300)
    with pytest.raises(UserError, match="300 token ids, but the model's vocab_size is 299"):
        blend.check_vocabulary(299)


def steps(blend: Blend, position: int, layout: tuple[int, int, int], count: int) -> list[torch.Tensor]:
    """The global batches of `count` steps as all ranks together see them, samples sorted by first token."""
    micro, per_step, data_size = layout
    ranks = [micro_batches(blend, position, micro, per_step, rank, data_size) for rank in range(data_size)]
    batches = []
    for _ in range(count):
        rows = torch.cat([next(rank) for rank in ranks for _ in range(per_step)])
        batches.append(rows[torch.argsort(rows[:, 0], stable=True)])
    return batches


@settings(max_examples=20, deadline=None)
@given(position=st.integers(0, 10**6))
def test_every_layout_sees_the_same_global_batches(blend: Blend, position: int) -> None:
    layouts = [(12, 1, 1), (1, 12, 1), (1, 1, 12), (2, 3, 2), (3, 2, 2), (4, 1, 3), (1, 4, 3)]
    expected = [
        np.sort([int(blend[position + step * 12 + i][0]) for i in range(12)]).tolist() for step in range(2)
    ]
    for layout in layouts:
        assert [batch[:, 0].tolist() for batch in steps(blend, position, layout, 2)] == expected


def test_resuming_equals_having_continued(blend: Blend) -> None:
    whole = steps(blend, 100, (2, 3, 2), 6)
    resumed = steps(blend, 100 + 3 * 12, (4, 1, 3), 3)
    assert all(torch.equal(a, b) for a, b in zip(whole[3:], resumed, strict=True))


def test_micro_batches_go_to_the_ranks_in_turn(blend: Blend) -> None:
    batch = next(itertools.islice(micro_batches(blend, 5, 2, 3, data_rank=0, data_size=2), 1, 2))
    assert batch.dtype == torch.int64
    assert batch.shape == (2, SEQUENCE + 1)
    start = 5 + (1 * 2 + 0) * 2
    assert torch.equal(batch, torch.from_numpy(np.stack([blend[start], blend[start + 1]])))


def test_the_next_micro_batch_is_expected_while_one_is_computed(
    blend: Blend, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected: list[tuple[str, int, int]] = []
    monkeypatch.setattr(
        TokenFile, "expect", lambda file, start, length: expected.append((file.prefix, start, length))
    )
    mine = [5 + (m * 2 + 1) * 3 + i for m in range(6) for i in range(3)]  # of rank 1 of 2, in threes
    windows = [blend.expect(position) for position in mine]
    ranges, expected = expected, []
    assert [length for _, _, length in ranges] == [SEQUENCE + 1] * 18
    assert {Path(prefix).name for prefix, _, _ in ranges} == {"a", "b"}
    first_tokens = {"a": 0, "b": 10_000}
    assert [int(window[0]) for window in windows] == [
        first_tokens[Path(prefix).name] + start for prefix, start, _ in ranges
    ]
    for count, batch in enumerate(itertools.islice(micro_batches(blend, 5, 3, 2, 1, 2), 5), 1):
        assert batch.tolist() == [window.tolist() for window in windows[3 * (count - 1) : 3 * count]]
        assert expected == ranges[: 3 * (count + 1)]


@pytest.mark.parametrize("arguments", [(0, 1, 0, 1), (1, 0, 0, 1), (1, 1, 2, 2), (1, 1, -1, 2), (1, 1, 0, 0)])
def test_impossible_layouts_are_refused_at_once(blend: Blend, arguments: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="micro_batch_size"):
        micro_batches(blend, 0, *arguments)
