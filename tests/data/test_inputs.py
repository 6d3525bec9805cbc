"""Which files are read, in which order, and which share of them each node takes."""

from __future__ import annotations

import os
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_tokenformer.data.inputs import expand_inputs, parse_shard, take_shard
from megatron_tokenformer.errors import UserError


def test_globs_are_sorted_and_files_read_once(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.json.gz", "[x].jsonl"):
        (tmp_path / name).touch()
    found = expand_inputs([str(tmp_path / name) for name in ("?.jsonl", "a*", "*.gz", "[x].jsonl")])
    assert [Path(path).name for path in found] == ["a.jsonl", "b.jsonl", "c.json.gz", "[x].jsonl"]


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [("*.jsonl", "no input file matches"), ("*.txt", "does not end"), ("sub*", "not a file")],
)
def test_bad_inputs_are_named(tmp_path: Path, pattern: str, reason: str) -> None:
    (tmp_path / "a.txt").touch()
    (tmp_path / "sub").mkdir()
    with pytest.raises(UserError, match=reason) as caught:
        expand_inputs([str(tmp_path / pattern)])
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["", "3", "3/3", "-1/3", "0/0", "a/b", "1/2/3"])
def test_a_shard_is_counted_from_zero(text: str) -> None:
    assert parse_shard("0/1") == (0, 1)
    assert parse_shard("15/16") == (15, 16)
    with pytest.raises(UserError, match="is not I/N with I from 0 to N - 1"):
        parse_shard(text)


@given(sizes=st.lists(st.integers(0, 1000), min_size=1, max_size=30), data=st.data())
def test_shards_are_neighbours_none_is_empty_and_together_they_are_all(
    sizes: list[int], data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, len(sizes)))
    paths = [str(number) for number in range(len(sizes))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os.path, "getsize", lambda path: sizes[int(path)])
        shards = [take_shard(paths, (index, count)) for index in range(count)]
    assert [path for shard in shards for path in shard] == paths
    assert all(shards)


def test_shards_are_as_even_as_whole_files_allow(tmp_path: Path) -> None:
    sizes = [100, 1, 1, 98, 50, 50, 100]
    paths = [tmp_path / f"{number}.jsonl" for number in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        path.write_bytes(bytes(size))
    ends = list(accumulate(len(take_shard([str(p) for p in paths], (index, 4))) for index in range(4)))
    assert ends == [1, 4, 6, 7]


def test_fewer_files_than_shards_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(UserError, match="only 1 input files"):
        take_shard([str(tmp_path / "a.jsonl")], (0, 2))
