"""Every damage is told with file and position, and a sound dataset is described as it is."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tokenformer.data import inspection
from megatron_tokenformer.data.encode import Job
from megatron_tokenformer.data.indexed import TokenFileWriter
from megatron_tokenformer.data.inspection import Damage, inspect_dataset
from megatron_tokenformer.data.lengths import LengthCounts
from megatron_tokenformer.data.preprocess import preprocess
from megatron_tokenformer.data.tokenizer_training import train_tokenizer
from megatron_tokenformer.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["ab", "日本", "hello world", "x" * 50]
# Sequences of TEXTS as bytes and an end of document each; where the tables of their index begin.
LENGTHS = [3, 7, 12, 51]
LENGTHS_AT, POINTERS_AT, BOUNDARIES_AT = 34, 34 + 4 * 4, 34 + 12 * 4


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    """The prefix of a dataset made by preprocessing."""
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in TEXTS))
    job = Job("ByteTokenizer", None, append_eod=True)
    return preprocess([str(path)], str(tmp_path / "d"), job).datasets[0]["prefix"]


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/inspect_dataset.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def write(prefix: Path, lengths: list[int], sequences: list[int]) -> str:
    """A pair as Megatron-LM may write it: several sequences a document, no description."""
    with TokenFileWriter(str(prefix), np.dtype(np.uint16)) as writer:
        writer.add(np.arange(sum(lengths)), np.array(lengths, np.int64), np.array(sequences, np.int64))
        writer.finish()
    return str(prefix)


def edit(path: str, at: int, form: str, value: int) -> None:
    """Write one number into a file."""
    content = bytearray(Path(path).read_bytes())
    struct.pack_into(form, content, at, value)
    Path(path).write_bytes(content)


def test_a_sound_dataset(dataset: str) -> None:
    found = inspect_dataset(dataset)
    assert found.damages == []
    assert found.index is not None
    assert (found.index.documents, found.index.sequences, found.tokens) == (4, 4, sum(LENGTHS))
    assert found.bytes == sum(Path(dataset + suffix).stat().st_size for suffix in (".bin", ".idx"))
    assert (found.vocab_size, found.largest_id) == (257, 256)
    assert found.lengths.summary() == {"mean": sum(LENGTHS) / 4, "median": 9.5, "max": 51}
    assert found.lengths.histogram() == [(2, 3, 1), (4, 7, 1), (8, 15, 1), (16, 31, 0), (32, 63, 1)]


INDEX_DAMAGES = {
    "length": (LENGTHS_AT + 4, "<i", 8, [("idx", POINTERS_AT + 16, "sequence 2 is 20, .* end at 22")]),
    "negative length": (LENGTHS_AT + 8, "<i", -2, [("idx", LENGTHS_AT + 8, "sequence 2 has the length -2")]),
    "last length": (LENGTHS_AT + 12, "<i", 50, [("bin", 144, "146 bytes, but the lengths .* to 144")]),
    "pointer": (POINTERS_AT + 16, "<q", 21, [("idx", POINTERS_AT + 16, "sequence 2 is 21, .* end at 20")]),
    "last pointer": (POINTERS_AT + 24, "<q", 0, [("idx", POINTERS_AT + 24, "3 is 0, .* end at 44")]),
    "first boundary": (BOUNDARIES_AT, "<q", 1, [("idx", BOUNDARIES_AT, "first .* sequence 1, not at 0")]),
    "boundary": (
        BOUNDARIES_AT + 16,
        "<q",
        0,
        [("idx", BOUNDARIES_AT + 16, "2 is 0, after one of 1")],
    ),
    "high boundary": (BOUNDARIES_AT + 8, "<q", 9, [("idx", BOUNDARIES_AT + 16, "2 is 2, after one of 9")]),
    "last boundary": (BOUNDARIES_AT + 32, "<q", 3, [("idx", BOUNDARIES_AT + 32, "at sequence 3 of 4")]),
    "sequences": (18, "<Q", 5, [("idx", None, "5 sequences and 5 document boundaries need 134")]),
    "documents": (26, "<Q", 0, [("idx", None, "0 document boundaries need")]),
    "magic": (0, "<B", 0, [("idx", None, "not a Megatron index")]),
    "version": (9, "<Q", 2, [("idx", None, "version 2")]),
    "type": (17, "<B", 4, [("bin", 146, "add up to 292"), ("json", None, "says uint16, .* has int32")]),
}


@pytest.mark.parametrize("name", INDEX_DAMAGES)
@pytest.mark.parametrize("size", [1, 3, 1 << 20])
def test_damage_in_the_index(dataset: str, name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Parts of one and three: damage is found at their edges as well.
    monkeypatch.setattr(inspection.parts, "__defaults__", (size,))
    at, form, value, expected = INDEX_DAMAGES[name]
    edit(f"{dataset}.idx", at, form, value)
    damages = inspect_dataset(dataset).damages
    for suffix, position, problem in expected:
        wanted = "" if position is None else f"byte {position}"
        assert any(tells(damage, f"{dataset}.{suffix}", wanted, problem) for damage in damages), damages


def tells(damage: Damage, file: str, position: str, problem: str) -> bool:
    return damage.file == file and position in damage.position and bool(re.search(problem, damage.problem))


@pytest.mark.parametrize("bit", range(8))
def test_every_flipped_bit_of_the_index_is_found(dataset: str, bit: int) -> None:
    """But those that describe another sound dataset of the same bytes: document boundaries moved."""
    good = Path(f"{dataset}.idx").read_bytes()
    for at in range(len(good)):
        flipped = bytearray(good)
        flipped[at] ^= 1 << bit
        Path(f"{dataset}.idx").write_bytes(flipped)
        boundaries = np.frombuffer(flipped, np.int64, 5, BOUNDARIES_AT)
        moved = at >= BOUNDARIES_AT and boundaries[0] == 0 and boundaries[-1] == 4
        harmless = moved and bool((np.diff(boundaries) >= 0).all())
        assert bool(inspect_dataset(dataset, log_interval=60).damages) != harmless, at


@pytest.mark.parametrize("change", [-2, -1, 1, 2, -146])
def test_a_bin_of_another_size(dataset: str, change: int) -> None:
    tokens = Path(f"{dataset}.bin").read_bytes()
    Path(f"{dataset}.bin").write_bytes(tokens[:change] if change < 0 else tokens + bytes(change))
    damages = inspect_dataset(dataset).damages
    place = f"byte {min(146, 146 + change)}"
    assert tells(damages[0], f"{dataset}.bin", place, f"has {146 + change} bytes, but .* add up to 146")


def test_ids_outside_the_vocabulary(dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "_TOKENS", 8)
    edit(f"{dataset}.bin", 2 * 30, "<H", 257)
    edit(f"{dataset}.bin", 2 * 70, "<H", 65_535)
    problem = "token 30 has the id 257, outside of a vocabulary of 257"
    assert inspect_dataset(dataset).damages == [Damage(f"{dataset}.bin", "byte 60", problem, 2)]
    assert inspect_dataset(dataset, vocab_size=65_536).damages == []
    assert inspect_dataset(dataset, read_tokens=False).damages == []
    assert inspect_dataset(dataset, vocab_size=100).damages[0].problem.startswith("token 2 has the id 256")


def test_negative_ids_without_a_vocabulary(tmp_path: Path) -> None:
    with TokenFileWriter(str(tmp_path / "a"), np.dtype(np.int32)) as writer:
        writer.add(np.array([1, -5, 2]), np.array([3]))
        writer.finish()
    (damage,) = inspect_dataset(str(tmp_path / "a")).damages
    assert str(damage) == f"{tmp_path}/a.bin, byte 4: token 1 has the id -5, outside of any vocabulary"


def test_a_description_that_differs_or_is_damaged(dataset: str) -> None:
    path = Path(f"{dataset}.json")
    good = json.loads(path.read_text())
    path.write_text(json.dumps(good | {"documents": 5, "tokens": 72, "dtype": "int32"}))
    assert [(damage.file, damage.position) for damage in inspect_dataset(dataset).damages] == [
        (str(path), "key 'documents'"),
        (str(path), "key 'tokens'"),
        (str(path), "key 'dtype'"),
    ]
    for content in ("{", "[]", "{}", json.dumps(good | {"tokenizer": {"vocab_size": "many"}})):
        path.write_text(content)
        (damage,) = inspect_dataset(dataset).damages
        assert damage.file == str(path) and "not a description" in damage.problem


def test_several_sequences_a_document_and_none(tmp_path: Path) -> None:
    found = inspect_dataset(write(tmp_path / "a", [2, 3, 4], [2, 0, 1]))
    assert found.damages == [] and found.vocab_size is None and found.index is not None
    assert (found.index.documents, found.index.sequences) == (3, 3)
    assert found.lengths.summary() == {"mean": 3.0, "median": 4.0, "max": 5}
    empty = inspect_dataset(write(tmp_path / "b", [], []))
    assert empty.damages == [] and empty.lengths.histogram() == []
    assert empty.lengths.summary() == {"mean": 0.0, "median": 0.0, "max": 0}


@settings(max_examples=40, deadline=None)
@given(documents=st.lists(st.lists(st.integers(0, 50), max_size=3), max_size=9))
def test_whatever_is_written_is_sound(documents: list[list[int]]) -> None:
    lengths = [length for document in documents for length in document]
    with tempfile.TemporaryDirectory() as folder:
        prefix = write(Path(folder, "a"), lengths, [len(document) for document in documents])
        found = inspect_dataset(prefix, log_interval=60)
        assert found.damages == []
        assert (found.index and found.index.documents, found.tokens) == (len(documents), sum(lengths))
        assert sum(count for _, _, count in found.lengths.histogram()) == len(documents)


@given(lengths=st.lists(st.one_of(st.integers(0, 70), st.integers(60_000, 1 << 31)), min_size=1))
def test_length_statistics_are_numpys(lengths: list[int]) -> None:
    counts = LengthCounts()
    for part in (lengths[:3], lengths[3:]):
        counts.add(np.array(part, np.int64))
    summary = counts.summary()
    assert summary["mean"] == pytest.approx(np.mean(lengths))
    assert summary["median"] == pytest.approx(np.median(lengths))
    assert summary["max"] == max(lengths)
    for low, high, count in counts.histogram():
        assert count == sum(low <= length <= high for length in lengths)
        assert high == 0 or (low & (low - 1) == 0 and high == 2 * low - 1)


def test_a_missing_dataset(tmp_path: Path, dataset: str) -> None:
    with pytest.raises(UserError, match=r"did you mean '.*d_text_document'") as caught:
        inspect_dataset(str(tmp_path / "d"))
    assert caught.value.exit_code == 2


def test_command_line_on_a_sound_dataset(dataset: str) -> None:
    done = run_tool(dataset, "--documents", "2", "--json")
    assert done.returncode == 0, done.stderr
    assert 'document 1, 7 tokens: "日本"' in done.stdout
    assert "documents 4, sequences 4, tokens 73 (uint16)" in done.stdout
    assert "8 - 15             1  25.0 %" in done.stdout
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["documents"], told["tokens"], told["dtype"]) == (4, 73, "uint16")
    assert told["first_documents"] == [{"tokens": 3, "text": "ab"}, {"tokens": 7, "text": "日本"}]
    assert told["damages"] == [] and told["ids_verified"]


def test_command_line_on_a_damaged_dataset(dataset: str) -> None:
    edit(f"{dataset}.bin", 10, "<H", 300)
    done = run_tool(dataset, "--json")
    assert done.returncode == 1
    problem = "token 5 has the id 300, outside of a vocabulary of 257"
    assert f"DAMAGED: {dataset}.bin, byte 10: {problem}" in done.stdout
    assert done.stderr.splitlines()[-1] == f"error: {dataset} is damaged: {dataset}.bin, byte 10: {problem}"
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["damages"] == [
        {"file": f"{dataset}.bin", "position": "byte 10", "problem": problem, "count": 1}
    ]
    unread = run_tool(dataset, "--no-verify")
    assert unread.returncode == 0
    assert "ids were not read" in unread.stdout


def test_command_line_on_a_header_nobody_can_read(dataset: str) -> None:
    edit(f"{dataset}.idx", 0, "<B", 0)
    done = run_tool(dataset, "--json")
    assert done.returncode == 1
    assert len([line for line in done.stderr.splitlines() if "error" in line]) == 1
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["documents"] is None and told["damages"][0]["position"] == "header"


def test_texts_that_the_terminal_cannot_show(dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = run_tool(dataset)
    assert done.returncode == 0, done.stderr
    assert r'"\u65e5\u672c"' in done.stdout


def test_command_line_without_and_with_another_tokenizer(tmp_path: Path, dataset: str) -> None:
    bare = write(tmp_path / "bare", [2, 3, 30], [2, 1])
    done = run_tool(bare)
    assert done.returncode == 0, done.stderr
    assert "document 0, 5 tokens: ids 0 1 2 3 4\n" in done.stdout
    assert "ids 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 ...\n" in done.stdout
    decoded = run_tool(bare, "--tokenizer-type", "ByteTokenizer")
    assert r'document 0, 5 tokens: "\u0000\u0001' in decoded.stdout
    edit(f"{bare}.bin", 0, "<Q", 0x7F_009B_00C2_0041)
    decoded = run_tool(bare, "--tokenizer-type", "ByteTokenizer")
    assert r'document 0, 5 tokens: "A\u009b\u007f\u0004"' in decoded.stdout
    train_tokenizer([str(tmp_path / "in.jsonl")], "HFTokenizer", 300, str(tmp_path / "t.json"))
    for arguments, reason in (
        (("--tokenizer-model", str(tmp_path / "t.json")), "made with another"),
        ((), "needs a model file"),
    ):
        refused = run_tool(dataset, "--tokenizer-type", "HFTokenizer", *arguments)
        assert refused.returncode == 2
        assert reason in refused.stderr and len(refused.stderr.splitlines()) == 1
    missing = run_tool(str(tmp_path / "none"))
    assert missing.returncode == 2 and len(missing.stderr.splitlines()) == 1


def test_a_tokenizer_that_changed_does_not_decode(tmp_path: Path) -> None:
    text = tmp_path / "in.jsonl"
    text.write_bytes(orjson.dumps({"text": "hello hello world"}) + b"\n")
    model = tmp_path / "t.json"
    train_tokenizer([str(text)], "HFTokenizer", 260, str(model))
    prefix = preprocess([str(text)], str(tmp_path / "d"), Job("HFTokenizer", str(model))).datasets[0][
        "prefix"
    ]
    assert '"hello hello world"' in run_tool(prefix).stdout
    model.write_text(model.read_text() + " ")
    changed = run_tool(prefix)
    assert "no longer the tokenizer" in changed.stdout and ": ids " in changed.stdout
    model.unlink()
    assert "t.json is not here" in run_tool(prefix).stdout


def test_neither_tool_imports_torch() -> None:
    code = (
        "import sys, megatron_tokenformer.data.inspection, megatron_tokenformer.data.merging;"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "set()\n"
