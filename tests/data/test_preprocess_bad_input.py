"""Bad input stops a run with file, line and reason, or is left out and counted; nothing else is lost."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
import zstandard

from megatron_tokenformer.data import problems
from megatron_tokenformer.data.preprocess import Options, preprocess
from megatron_tokenformer.errors import UserError
from tests.data.runs import BYTES, json_lines, names, output_bytes, run_tool

BAD_LINES = {
    problems.MALFORMED_JSON: b"{broken",
    problems.INVALID_UTF8: b'{"text": "\xff"}',
    problems.NO_TEXT: b'{"body": "a"}',
    problems.TEXT_NO_STRING: b'{"text": 7}',
    problems.NO_OBJECT: b"[1]",
}


def long_texts() -> list[str]:
    return [os.urandom(200).hex() for _ in range(300)]


def write_bad_file(folder: Path, kind: str) -> tuple[str, list[str]]:
    """A file that cannot be read to its end, and the texts that can be read of it."""
    texts = long_texts()
    if kind == problems.UNREADABLE:
        path = folder / "in-5.jsonl"
        path.symlink_to("/proc/self/mem")  # a file for all who ask, but nobody can read its first byte
        return str(path), []
    path = folder / "in-5.jsonl.zst"
    whole = zstandard.compress(json_lines(texts))
    if kind == problems.DAMAGED:
        path = folder / "in-5.jsonl.gz"
        path.write_bytes(b"no gzip at all")
        return str(path), []
    path.write_bytes(whole[: len(whole) // 2])
    decompressor = zstandard.ZstdDecompressor().decompressobj()
    return str(path), texts[: decompressor.decompress(path.read_bytes()).count(b"\n")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two good files around the place of a bad one."""
    for name in ("in-1", "in-9"):
        (tmp_path / f"{name}.jsonl").write_bytes(json_lines([f"good in {name}"]))
    return tmp_path


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_fails_by_name_or_is_left_out(folder: Path, kind: str, workers: int) -> None:
    good = json_lines(["one", "two"])
    (folder / "in-5.jsonl").write_bytes(good + BAD_LINES[kind] + b"\n" + json_lines(["four"]))
    inputs = [str(folder / "in-*.jsonl")]
    with pytest.raises(UserError, match=r"in-5\.jsonl:3: ") as caught:
        preprocess(inputs, str(folder / "out"), BYTES, Options(workers=workers))
    assert caught.value.exit_code == 1
    assert not [name for name in names(folder) if name.startswith("out") and name.endswith(("n", "x"))]

    result = preprocess(inputs, str(folder / "out"), BYTES, Options(workers=workers, on_error="skip"))
    (folder / "in-5.jsonl").write_bytes(good + json_lines(["four"]))
    preprocess(inputs, str(folder / "clean"), BYTES)
    assert output_bytes(folder / "out") == output_bytes(folder / "clean")
    found = result.datasets[0]["problems"]
    assert {name: entry["count"] for name, entry in found.items()} == {kind: 1}
    assert "in-5.jsonl:3: " in found[kind]["first"][0]


@pytest.mark.parametrize("kind", [problems.TRUNCATED, problems.DAMAGED, problems.UNREADABLE])
def test_a_bad_file_fails_by_name_or_is_left_from_there_on(folder: Path, kind: str) -> None:
    path, readable = write_bad_file(folder, kind)
    inputs = [str(folder / "in-1.jsonl"), path, str(folder / "in-9.jsonl")]
    with pytest.raises(UserError, match=path) as caught:
        preprocess(inputs, str(folder / "out"), BYTES)
    assert caught.value.exit_code == 1
    result = preprocess(inputs, str(folder / "out"), BYTES, Options(on_error="skip"))
    (folder / "readable.jsonl").write_bytes(json_lines(readable))
    inputs[1] = str(folder / "readable.jsonl")
    preprocess(inputs, str(folder / "clean"), BYTES)
    assert output_bytes(folder / "out") == output_bytes(folder / "clean")
    assert {name: entry["count"] for name, entry in result.datasets[0]["problems"].items()} == {kind: 1}


def test_all_kinds_are_counted_and_the_first_of_each_is_listed(folder: Path) -> None:
    bad = b"".join(line + b"\n" for line in BAD_LINES.values())
    (folder / "in-5.jsonl.gz").write_bytes(gzip.compress(bad + bad)[:-9])
    arguments = ("--input", str(folder / "in-*"), "--output-prefix", str(folder / "out"))
    arguments += ("--tokenizer-type", "ByteTokenizer", "--workers", "1")
    done = run_tool(*arguments, "--on-error", "skip")
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith("left out: ")]
    assert len(told) == len(BAD_LINES) + 1
    for line, kind in zip(told, BAD_LINES):
        assert line.startswith(f"left out: 2 x {kind}; first {folder}/in-5.jsonl.gz:")
    description = json.loads((folder / "out_text_document.json").read_text())
    assert description["documents"] == 2
    assert description["problems"][problems.TRUNCATED]["count"] == 1


def test_only_bad_input_is_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"{broken\n")
    with pytest.raises(UserError, match=r"no documents .* 1 x malformed JSON"):
        preprocess([str(tmp_path / "a.jsonl")], str(tmp_path / "out"), BYTES, Options(on_error="skip"))
    assert names(tmp_path) == ["a.jsonl"]
