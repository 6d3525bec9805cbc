"""Memory does not depend on the input, a giant document or a million small ones, and little is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_tokenformer.data.indexed import TokenFile
from megatron_tokenformer.data.tokenizer_training import train_tokenizer
from megatron_tokenformer.data.tokenizers import load_tokenizer
from tests.data.runs import ROOT, json_lines

MEGABYTES_ALLOWED = 300
SENTENCE = 'The "giant" said: naïve 3.14 tokens,\nline by line; and 日本 too, so that nothing is plain. '


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    (folder / "a.jsonl").write_bytes(json_lines([SENTENCE * 50]))
    train_tokenizer([str(folder / "a.jsonl")], "HFTokenizer", 400, str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


def peak_memory(folder: Path, model: str) -> float:
    """Run the tool on `a.jsonl` with two threads; the memory in MB that it has had at most."""
    code = (
        "import re, runpy, sys\n"
        "del sys.argv[0]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "memory = re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]\n"
        "print(int(memory) / 1024)"
    )
    command = [sys.executable, "-c", code, str(ROOT / "tools/preprocess_data.py"), "--append-eod"]
    command += ["--input", str(folder / "a.jsonl"), "--output-prefix", str(folder / "out"), "--workers", "2"]
    command += ["--tokenizer-type", "HFTokenizer", "--tokenizer-model", model]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.splitlines()[-1])


def test_a_document_of_200_megabytes(tmp_path: Path, model: str) -> None:
    repeats = 200_000_000 // len(SENTENCE.encode())
    with open(tmp_path / "a.jsonl", "wb") as file:
        file.write(json_lines(["before"]) + b'{"text": "')
        piece = json.dumps(SENTENCE * 1000)[1:-1].encode()
        for _ in range(repeats // 1000):
            file.write(piece)
        file.write(b'", "meta": {}}\n' + json_lines(["after"]))
    assert peak_memory(tmp_path, model) < MEGABYTES_ALLOWED

    tokenizer = load_tokenizer("HFTokenizer", model)
    found = TokenFile(str(tmp_path / "out_text_document"))
    lengths = found.document_lengths()
    first = [*tokenizer.encode("before"), tokenizer.eod_id]
    last = [*tokenizer.encode("after"), tokenizer.eod_id]
    assert lengths.size == 3
    assert found.window(0, len(first)).tolist() == first
    assert found.window(found.tokens - len(last), len(last)).tolist() == last
    # The text is one sentence over and over, so its ids are one period over and over, from the second
    # sentence to the last but one, and its beginning and end are those of a shorter text of the kind.
    ids = np.asarray(tokenizer.encode(SENTENCE * 1000), found.dtype)
    body = found.window(len(first), int(lengths[1]) - 1)
    period = len(tokenizer.encode(SENTENCE * 3)) - len(tokenizer.encode(SENTENCE * 2))
    assert body.size == ids.size + (repeats // 1000 - 1) * 1000 * period
    assert (body[: ids.size - period] == ids[:-period]).all()
    assert (body[period : -2 * period] == body[2 * period : -period]).all()
    assert (body[period - ids.size :] == ids[period:]).all()


def test_a_million_small_documents(tmp_path: Path, model: str) -> None:
    lines = json_lines(["A small document."] * 1000)
    (tmp_path / "a.jsonl").write_bytes(lines * 1000)
    assert peak_memory(tmp_path, model) < MEGABYTES_ALLOWED
    found = TokenFile(str(tmp_path / "out_text_document"))
    assert found.documents == 1_000_000
    tokens = [*load_tokenizer("HFTokenizer", model).encode("A small document."), 0]
    assert found.tokens == 1_000_000 * len(tokens)
    assert (found.window(0, found.tokens).reshape(-1, len(tokens)) == np.array(tokens)).all()


def test_starts_without_torch_or_transformers() -> None:
    code = (
        "import sys, megatron_tokenformer.data.preprocess;print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "set()\n"
