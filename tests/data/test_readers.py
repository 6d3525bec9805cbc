"""Documents come out as they went in, from every kind of file; what is wrong is named with file and line."""

from __future__ import annotations

import gzip
import os
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tokenformer.data import problems, readers
from megatron_tokenformer.data.readers import Chunk, LongLine, read_chunks, read_texts
from megatron_tokenformer.errors import UserError

PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def lines_of(texts: list[str]) -> bytes:
    return b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts)


def texts_in(path: Path) -> list[str]:
    return list(read_texts([str(path)]))


@pytest.mark.parametrize("suffix", PACK)
@settings(max_examples=25, deadline=None)
@given(texts=st.lists(st.text(), max_size=20), chunk_bytes=st.integers(1, 200))
def test_round_trip_at_any_chunk_size(suffix: str, texts: list[str], chunk_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"a.jsonl{suffix}")
        path.write_bytes(PACK[suffix](lines_of(texts)))
        assert texts_in(path) == texts
        chunks = list(read_chunks(str(path), chunk_bytes))
        assert b"".join(chunk.data for chunk in chunks) == lines_of(texts)
        assert sum(chunk.input_bytes for chunk in chunks) == path.stat().st_size


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_several_frames_in_one_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    parts = [[f"{part} {i}" for i in range(100)] for part in range(5)]
    path.write_bytes(b"".join(PACK[suffix](lines_of(part)) for part in parts))
    assert texts_in(path) == [text for part in parts for text in part]


def test_chunks_are_bounded_and_number_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of(["x" * 1000] * 1000))
    chunks = list(read_chunks(str(path), chunk_bytes=100_000))
    assert len(chunks) > 5
    assert max(len(chunk.data) for chunk in chunks) < 100_000 + 131_072
    line = 1
    for chunk in chunks:
        assert chunk.first_line == line
        line += chunk.data.count(b"\n")


def test_blank_lines_windows_line_ends_bom_and_a_missing_last_newline(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "b"}')
    assert texts_in(path) == ["a", "b"]


def test_a_bad_line_ends_the_reading_of_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of(["one", "two"]) + b"{broken\n" + lines_of(["four"]))
    with pytest.raises(UserError, match=f"{path}:3: malformed JSON") as caught:
        texts_in(path)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("keep", [0, 5, 0.5, -1])
def test_a_truncated_file_is_an_error(tmp_path: Path, suffix: str, keep: float) -> None:
    whole = PACK[suffix](lines_of([os.urandom(50).hex() for _ in range(2000)]))
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(whole[: int(len(whole) * keep) if keep == 0.5 else int(keep)])
    with pytest.raises(UserError, match="end too early") as caught:
        texts_in(path)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_damaged_and_mislabelled_compressed_data(tmp_path: Path, suffix: str) -> None:
    damaged = bytearray(PACK[suffix](lines_of([os.urandom(50).hex() for _ in range(2000)])))
    damaged[len(damaged) // 2] ^= 0xFF
    damaged[len(damaged) // 2 + 1] ^= 0xFF
    for content in (bytes(damaged), lines_of(["not compressed"])):
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(content)
        with pytest.raises(UserError):
            texts_in(path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_what_comes_before_a_truncation_is_given_out_in_whole_lines(tmp_path: Path, suffix: str) -> None:
    texts = [os.urandom(50).hex() for _ in range(5000)]
    whole = PACK[suffix](lines_of(texts))
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(whole[: len(whole) * 2 // 3])
    chunks = list(read_chunks(str(path), chunk_bytes=50_000))
    data = b"".join(chunk.data for chunk in chunks)
    count = data.count(b"\n")
    assert data == lines_of(texts[:count])
    assert count > 1000
    assert chunks[-1].problem.kind == problems.TRUNCATED
    assert f"after line {count}:" in chunks[-1].problem.message
    assert [chunk.ends_file for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_an_unreadable_file_is_a_problem_of_its_own_kind(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").mkdir()  # what any user, root too, cannot read
    chunk = next(read_chunks(str(tmp_path / "a.jsonl")))
    assert chunk.problem.kind == problems.UNREADABLE
    assert "Is a directory" in chunk.problem.message


@settings(max_examples=50, deadline=None)
@given(
    texts=st.lists(st.integers(0, 300), max_size=12),
    chunk_bytes=st.integers(20, 120),
    long_line_bytes=st.integers(120, 250),
    newline=st.booleans(),
)
def test_long_lines_come_alone_and_nothing_is_lost_beside_them(
    texts: list[int], chunk_bytes: int, long_line_bytes: int, newline: bool
) -> None:
    data = lines_of(["x" * length for length in texts])
    data = data if newline else data[:-1]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_BLOCK_BYTES", 16)
        path = Path(folder, "a.jsonl")
        path.write_bytes(data)
        found, line = b"", 1
        for chunk in read_chunks(str(path), chunk_bytes, long_line_bytes, folder):
            assert chunk.first_line == line
            if isinstance(chunk, LongLine):
                whole = chunk.file.read()
                assert len(whole) > long_line_bytes - 16
                found += whole + b"\n"
                line += 1
            else:
                assert isinstance(chunk, Chunk)
                assert len(chunk.data) <= max(chunk_bytes, long_line_bytes) + 16
                found += chunk.data
                line += chunk.data.count(b"\n")
        assert found.removesuffix(b"\n") == data.removesuffix(b"\n")
        assert list(read_texts([str(path)])) == ["x" * length for length in texts]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_what_compresses_a_thousandfold_is_expanded_bit_by_bit(tmp_path: Path, suffix: str) -> None:
    line = lines_of(["x" * 1000])
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(PACK[suffix](line * 200_000))
    tracemalloc.start()
    lines = 0
    for chunk in read_chunks(str(path)):
        lines += chunk.data.count(b"\n")
        assert len(chunk.data) < 3 * readers.CHUNK_BYTES
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert lines == 200_000
    assert peak < 80e6  # of 200 MB


def test_zeros_behind_a_gzip_member_are_padding(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    member = gzip.compress(lines_of(["one"]))
    path.write_bytes(member + bytes(1000) + member + bytes(200_000))
    assert texts_in(path) == ["one", "one"]
