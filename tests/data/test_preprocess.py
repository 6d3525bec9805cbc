"""One output for one input: for any workers and packing Megatron's bytes, or an error and no files."""

from __future__ import annotations

import gzip
import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard

from megatron_tokenformer.data.encode import Job
from megatron_tokenformer.data.indexed import TokenFile
from megatron_tokenformer.data.preprocess import Options, preprocess
from megatron_tokenformer.data.tokenizer_training import train_tokenizer
from megatron_tokenformer.data.tokenizers import load_tokenizer
from megatron_tokenformer.errors import UserError
from tests.data.runs import BYTES, json_lines, names, output_bytes, run_tool

TEXTS = [f"Document {i} says {'again and ' * (i % 7)}that 日本 is {i * i}.\n" for i in range(300)]


@pytest.fixture
def inputs(tmp_path: Path) -> str:
    """Ten files of 30 documents: more chunks than two workers may have in flight.  Returns their glob."""
    for part in range(10):
        (tmp_path / f"in-{part}.jsonl").write_bytes(json_lines(TEXTS[30 * part : 30 * part + 30]))
    return str(tmp_path / "in-*.jsonl")


@pytest.fixture
def hf_model(tmp_path: Path, inputs: str) -> str:
    train_tokenizer([inputs], "HFTokenizer", 400, str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "tokenizer.json")


def test_equal_for_any_workers_and_packing_and_equal_to_megatron_core(
    tmp_path: Path, inputs: str, hf_model: str
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    job = Job("HFTokenizer", hf_model, append_eod=True)
    tokenizer = load_tokenizer("HFTokenizer", hf_model)
    (tmp_path / "all.jsonl.gz").write_bytes(gzip.compress(json_lines(TEXTS)))
    (tmp_path / "all.jsonl.zst").write_bytes(zstandard.compress(json_lines(TEXTS)))
    builder = IndexedDatasetBuilder(str(tmp_path / "megatron_text_document.bin"), dtype=np.uint16)
    for text in TEXTS:
        builder.add_item(torch.tensor([*tokenizer.encode(text), tokenizer.eod_id]))
        builder.end_document()
    builder.finalize(str(tmp_path / "megatron_text_document.idx"))
    expected = output_bytes(tmp_path / "megatron")

    for name, source, workers in (
        ("one", inputs, 1),
        ("two", inputs, 2),
        ("four", inputs, 4),
        ("processes", inputs, 6),
        ("gz", str(tmp_path / "all.jsonl.gz"), 1),
        ("zst", str(tmp_path / "all.jsonl.zst"), 2),
    ):
        preprocess([source], str(tmp_path / name), job, Options(workers=workers))
        assert output_bytes(tmp_path / name) == expected


def test_the_summary_counts_and_describes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(["ab", "", "é", ""]))
    summary = preprocess([str(path)], str(tmp_path / "new/folder/out"), BYTES).datasets[0]
    assert summary == json.loads(Path(f"{summary['prefix']}.json").read_text())
    assert summary["prefix"] == str(tmp_path / "new/folder/out_text_document")
    expected = {"documents": 2, "tokens": 6, "text_bytes": 4, "empty_texts": 2, "dtype": "uint16"}
    assert {name: summary[name] for name in expected} == expected
    assert summary["tokenizer"]["vocab_size"] == 257
    assert summary["inputs"] == [{"path": str(path), "bytes": path.stat().st_size}]
    file = TokenFile(summary["prefix"])
    assert file.window(0, file.tokens).tolist() == [*b"ab", 256, *"é".encode(), 256]


def test_without_append_eod_and_with_another_key(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"body": "ab"}\n{"body": "c"}\n')
    summary = preprocess([str(path)], str(tmp_path / "out"), Job("ByteTokenizer", None, "body")).datasets[0]
    file = TokenFile(str(tmp_path / "out_body_document"))
    assert summary["tokens"] == 3
    assert file.window(0, 3).tolist() == [*b"abc"]


def test_an_end_of_document_spelled_out_in_a_text_is_counted(tmp_path: Path, hf_model: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(["one<|endoftext|>two", "three"]))
    job = Job("HFTokenizer", hf_model, append_eod=True)
    summary = preprocess([str(path)], str(tmp_path / "out"), job).datasets[0]
    assert (summary["documents"], summary["eod_inside_text"]) == (2, 1)


@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"text": ""}\n'])
def test_no_documents_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match="no documents"):
        preprocess([str(tmp_path / "a.jsonl")], str(tmp_path / "out"), BYTES)
    assert names(tmp_path) == ["a.jsonl"]


def test_existing_outputs_are_kept_unless_told(tmp_path: Path, inputs: str) -> None:
    preprocess([inputs], str(tmp_path / "out"), BYTES)
    old = output_bytes(tmp_path / "out")
    other = tmp_path / "b.jsonl"
    other.write_bytes(json_lines(["other"]))
    with pytest.raises(UserError, match="already exists; use --overwrite") as caught:
        preprocess([str(other)], str(tmp_path / "out"), BYTES)
    assert caught.value.exit_code == 2
    other.write_bytes(b"{broken")
    with pytest.raises(UserError, match="malformed"):
        preprocess([str(other)], str(tmp_path / "out"), BYTES, Options(overwrite=True))
    assert output_bytes(tmp_path / "out") == old
    other.write_bytes(json_lines(["other"]))
    preprocess([str(other)], str(tmp_path / "out"), BYTES, Options(overwrite=True))
    assert TokenFile(str(tmp_path / "out_text_document")).tokens == len("other") + 1


def test_command_line(tmp_path: Path, inputs: str) -> None:
    arguments = (
        "--output-prefix",
        str(tmp_path / "out"),
        "--tokenizer-type",
        "ByteTokenizer",
        "--append-eod",
    )
    done = run_tool("--input", inputs, "--workers", "2", *arguments)
    assert done.returncode == 0, done.stderr
    assert "300 documents" in done.stdout
    assert TokenFile(str(tmp_path / "out_text_document")).documents == 300

    refused = run_tool("--input", inputs, *arguments)
    assert refused.returncode == 2
    assert refused.stderr.splitlines() == [
        f"error: {tmp_path}/out_text_document.bin already exists; use --overwrite to replace it"
    ]


def test_a_full_disk_is_one_line_and_leaves_no_files(tmp_path: Path, inputs: str) -> None:
    before = names(tmp_path)
    failed = run_tool(
        *("--input", inputs, "--output-prefix", str(tmp_path / "out"), "--tokenizer-type", "ByteTokenizer"),
        *("--workers", "1"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4_096, 4_096)),
    )
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("error: cannot write")
    assert "Traceback" not in failed.stderr
    assert names(tmp_path) == before
