"""Documents come out as they went in, from every kind of file; what is wrong is named with file and line."""

from __future__ import annotations

import gzip
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tokenformer.data.readers import expand_inputs, read_chunks, read_documents
from megatron_tokenformer.errors import UserError

PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def lines_of(texts: list[str]) -> bytes:
    return b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts)


def texts_in(path: Path) -> list[str]:
    return [document.text for document in read_documents([str(path)])]


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
    assert max(len(chunk.data) for chunk in chunks) < 100_000 + 65_536
    line = 1
    for chunk in chunks:
        assert chunk.first_line == line
        line += chunk.data.count(b"\n")


def test_blank_lines_windows_line_ends_bom_and_a_missing_last_newline(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "b"}')
    assert [(d.line, d.text) for d in read_documents([str(path)])] == [(1, "a"), (4, "b")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "malformed JSON"),
        (b"\xef\xbb\xbf{}", "malformed JSON"),
        (b'{"text": "\xff"}', "invalid UTF-8: byte 0xff at column 11"),
        (b'{"body": "a", "id": 1}', "no key 'text'; the object has 'body', 'id'"),
        (b"{}", "no keys"),
        (b'{"text": null}', "NoneType, not a string"),
        (b'{"text": ["a"]}', "list, not a string"),
        (b'["text"]', "expected a JSON object with the key 'text', found list"),
        (b'"text"', "found str"),
        (b"7", "found int"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of(["one", "two"]) + line + b"\n" + lines_of(["four"]))
    with pytest.raises(UserError) as caught:
        texts_in(path)
    assert f"{path}:3: " in str(caught.value)
    assert reason in str(caught.value)
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
