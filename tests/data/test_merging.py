"""Parts joined are one pass, byte for byte; what does not belong together is refused and leaves nothing."""

from __future__ import annotations

import itertools
import json
import resource
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orjson
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tokenformer.data import merging
from megatron_tokenformer.data.encode import Job
from megatron_tokenformer.data.indexed import TokenFile, TokenFileWriter
from megatron_tokenformer.data.merging import merge_datasets
from megatron_tokenformer.data.preprocess import preprocess
from megatron_tokenformer.data.tokenizer_training import train_tokenizer
from megatron_tokenformer.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [f"Document {i} says {'again and ' * (i % 7)}that 日本 is {i * i}.\n" for i in range(90)]
BYTES = Job("ByteTokenizer", None, append_eod=True)


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    """Three files of 30 documents, the middle one of them packed."""
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl.zst", "c.jsonl")]
    for part, path in enumerate(paths):
        lines = b"".join(orjson.dumps({"text": text}) + b"\n" for text in TEXTS[30 * part : 30 * part + 30])
        path.write_bytes(zstandard.compress(lines) if path.suffix == ".zst" else lines)
    return [str(path) for path in paths]


def run_tool(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/merge_datasets.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)


def write(
    prefix: Path, tokens: list[int], dtype: type = np.uint16, sequences: list[int] | None = None
) -> str:
    """A pair without a description: sequences of one token each."""
    with TokenFileWriter(str(prefix), np.dtype(dtype)) as writer:
        counts = None if sequences is None else np.array(sequences)
        writer.add(np.array(tokens, np.int64), np.ones(len(tokens), np.int64), counts)
        writer.finish()
    return str(prefix)


def files(prefix: str) -> dict[str, bytes]:
    return {suffix: Path(prefix + suffix).read_bytes() for suffix in (".bin", ".idx")}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("cuts", [[0, 3], [0, 1, 2, 3], [0, 2, 3]])
def test_parts_merged_are_one_pass(
    tmp_path: Path, inputs: list[str], cuts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that even these small files are copied in several blocks.
    monkeypatch.setattr(merging, "_BLOCK_BYTES", 1000)
    train_tokenizer(inputs, "HFTokenizer", 400, str(tmp_path / "tokenizer.json"))
    job = Job("HFTokenizer", str(tmp_path / "tokenizer.json"), append_eod=True)
    one_pass = preprocess(inputs, str(tmp_path / "all"), job).datasets[0]
    parts = [
        preprocess(inputs[low:high], str(tmp_path / f"part-{low}"), job).datasets[0]["prefix"]
        for low, high in itertools.pairwise(cuts)
    ]
    before = [files(part) for part in parts]
    merged = merge_datasets(parts, str(tmp_path / "new/folder/out"))
    assert merged.described and merged.documents == 90
    assert files(merged.prefix) == files(one_pass["prefix"])
    # Order of keys included; only the name is the merged one's.
    expected = json.dumps({**one_pass, "prefix": merged.prefix}, indent=2) + "\n"
    assert Path(f"{merged.prefix}.json").read_text() == expected
    assert names(tmp_path / "new/folder") == ["out.bin", "out.idx", "out.json"]
    assert [files(part) for part in parts] == before


_DOCUMENTS = st.lists(st.lists(st.lists(st.integers(0, 999), max_size=4), max_size=3), max_size=5)


@settings(max_examples=40, deadline=None)
@given(datasets=st.lists(_DOCUMENTS, min_size=1, max_size=4))
def test_any_datasets_merged_equal_one_written_at_once(datasets: list[list[list[list[int]]]]) -> None:
    def write_documents(prefix: str, documents: list[list[list[int]]]) -> str:
        sequences = [sequence for document in documents for sequence in document]
        tokens = np.array([token for sequence in sequences for token in sequence], np.int64)
        with TokenFileWriter(prefix, np.dtype(np.uint16)) as writer:
            lengths = np.array([len(sequence) for sequence in sequences], np.int64)
            writer.add(tokens, lengths, np.array([len(document) for document in documents], np.int64))
            writer.finish()
        return prefix

    with tempfile.TemporaryDirectory() as folder:
        parts = [write_documents(f"{folder}/{i}", documents) for i, documents in enumerate(datasets)]
        whole = write_documents(f"{folder}/whole", [document for one in datasets for document in one])
        merged = merge_datasets(parts, f"{folder}/merged", log_interval=60)
        assert files(merged.prefix) == files(whole)


def test_documents_of_several_sequences_keep_their_boundaries(tmp_path: Path) -> None:
    parts = [
        write(tmp_path / "a", [1, 2]),
        write(tmp_path / "b", [3, 4, 5], sequences=[2, 0, 1]),
        write(tmp_path / "c", [6]),
    ]
    merged = merge_datasets(parts, str(tmp_path / "out"))
    assert not merged.described
    file = TokenFile(merged.prefix)
    assert file.document_lengths().tolist() == [1, 1, 2, 0, 1, 1]
    assert file.window(0, 6).tolist() == [1, 2, 3, 4, 5, 6]


@pytest.fixture
def pair(tmp_path: Path, inputs: list[str]) -> tuple[str, str]:
    """Two described parts of one preprocessing."""
    first, second = (
        preprocess([path], str(tmp_path / name), BYTES).datasets[0]["prefix"]
        for path, name in zip(inputs, "xy")
    )
    return first, second


def refuse(tmp_path: Path, parts: list[str], reason: str, exit_code: int = 2, output: str = "out") -> str:
    """Merging `parts` fails for `reason` and changes nothing; returns the message."""
    before = names(tmp_path)
    with pytest.raises(UserError, match=reason) as caught:
        merge_datasets(parts, str(tmp_path / output))
    assert caught.value.exit_code == exit_code
    assert names(tmp_path) == before
    return str(caught.value)


def edit_json(prefix: str, change: dict[str, object]) -> None:
    path = Path(f"{prefix}.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def test_other_types_and_tokenizers_are_refused(
    tmp_path: Path, inputs: list[str], pair: tuple[str, str]
) -> None:
    first, second = pair
    wide = write(tmp_path / "wide", [1], np.int32)
    plain = write(tmp_path / "plain", [1])
    refuse(tmp_path, [plain, wide], "token types differ: .*plain has uint16, .*wide int32")
    refuse(tmp_path, [first, plain], r"plain\.json is missing, .*x_text_document")
    refuse(tmp_path, [plain, first], r"plain\.json is missing")
    as_text = preprocess(inputs[:1], str(tmp_path / "t"), BYTES._replace(special_as_text=True)).datasets[0][
        "prefix"
    ]
    for parts in ([first, as_text], [as_text, first]):
        refuse(
            tmp_path, parts, "t_text_document was made with --special-tokens-as-text, .*x_text_document wi"
        )
    without = preprocess(inputs[:1], str(tmp_path / "w"), Job("ByteTokenizer", None)).datasets[0]["prefix"]
    refuse(
        tmp_path, [without, first], "x_text_document was made with --append-eod, .*w_text_document without"
    )
    tokenizer = json.loads(Path(f"{second}.json").read_text())["tokenizer"]
    edit_json(second, {"tokenizer": tokenizer | {"fingerprint": "0" * 64, "model": "other.json"}})
    message = refuse(tmp_path, [first, second], "tokenizers differ")
    assert f"{first} was made with ByteTokenizer (hash " in message
    assert f"{second} with other.json (hash 0000" in message


def test_missing_and_damaged_parts_are_refused(tmp_path: Path, pair: tuple[str, str]) -> None:
    first, second = pair
    refuse(tmp_path, [], "at least one")
    refuse(tmp_path, [first, str(tmp_path / "none")], r"none\.bin is missing")
    refuse(tmp_path, [first, str(tmp_path / "y")], r"did you mean '.*y_text_document'")
    edit_json(second, {"tokens": 1})
    refuse(tmp_path, [first, second], r"y_text_document\.json describes other data: it says tokens 1", 1)
    Path(f"{second}.json").write_text("[]")
    refuse(tmp_path, [first, second], r"y_text_document\.json is damaged", 1)
    tokens = Path(f"{second}.bin").read_bytes()
    Path(f"{second}.bin").write_bytes(tokens[:-2])
    refuse(tmp_path, [first, second], r"y_text_document\.bin has \d+ bytes, but .* describes", 1)


@pytest.mark.parametrize(
    ("at", "form", "numbers"),
    [
        (34, "<i", [7]),  # lengths that add up to more
        (34, "<2i", [-1, 3]),  # a negative one, but the right sum
        (34 + 36 + 8, "<q", [3]),  # boundaries that fall
    ],
)
def test_an_index_that_contradicts_itself_is_found_while_copying(
    tmp_path: Path, at: int, form: str, numbers: list[int]
) -> None:
    good, part = write(tmp_path / "good", [1, 2, 3]), write(tmp_path / "bad", [1, 2, 3])
    index = bytearray(Path(f"{part}.idx").read_bytes())
    struct.pack_into(form, index, at, *numbers)
    Path(f"{part}.idx").write_bytes(index)
    refuse(tmp_path, [good, part], "bad is damaged: its files contradict each other", 1)


def test_outputs_are_neither_inputs_nor_overwritten(tmp_path: Path, pair: tuple[str, str]) -> None:
    first, second = pair
    old = write(tmp_path / "out", [1])
    refuse(tmp_path, [first, second], r"out\.bin already exists; use --overwrite")
    (tmp_path / "link.bin").symlink_to(f"{first}.bin")
    (tmp_path / "link.idx").symlink_to(f"{first}.idx")
    refuse(tmp_path, [first, str(tmp_path / "link")], "given twice")
    for overwrite in (False, True):
        for output in (first, str(tmp_path / "link"), f"{tmp_path}/./x_text_document"):
            with pytest.raises(UserError, match="is also an input"):
                merge_datasets([first, second], output, overwrite=overwrite)
    assert merge_datasets([first, second], old, overwrite=True).documents == 60
    assert TokenFile(old).documents == 60
    # An old description must not outlive what it described.
    merge_datasets([write(tmp_path / "bare", [1])], old, overwrite=True)
    assert not Path(f"{old}.json").exists()


def test_a_failure_half_way_keeps_the_old_output(
    tmp_path: Path, pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = merge_datasets([pair[0]], str(tmp_path / "out")).prefix
    before, description = files(old), Path(f"{old}.json").read_bytes()
    everything = names(tmp_path)

    def break_off(part: merging.Pair) -> Iterator[np.ndarray]:
        yield np.ones(4, np.uint16)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(merging, "_token_blocks", break_off)
    with pytest.raises(UserError, match=r"cannot read .*x_text_document: Input/output error"):
        merge_datasets(list(pair), old, overwrite=True)
    assert (files(old), Path(f"{old}.json").read_bytes()) == (before, description)
    assert names(tmp_path) == everything


def test_command_line(tmp_path: Path, pair: tuple[str, str]) -> None:
    out = str(tmp_path / "out")
    done = run_tool("--input", *pair, "--output-prefix", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{out}: 60 documents, ")
    refused = run_tool("--input", *pair, "--output-prefix", out)
    assert refused.returncode == 2
    assert refused.stderr.splitlines() == [f"error: {out}.bin already exists; use --overwrite to replace it"]


def test_a_full_disk_is_one_line_and_leaves_no_files(tmp_path: Path, pair: tuple[str, str]) -> None:
    before = names(tmp_path)
    failed = run_tool(
        *("--input", *pair, "--output-prefix", str(tmp_path / "out")),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4_096, 4_096)),
    )
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1] == f"error: cannot write {tmp_path}/out: File too large"
    assert "Traceback" not in failed.stderr
    assert names(tmp_path) == before
