"""A .tiktoken file gives the ids of byte-pair merging by rank, whichever library does it."""

from __future__ import annotations

import base64
import itertools
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import orjson
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tokenformer.data import fast_tokenizer, tiktoken_tokenizer
from megatron_tokenformer.data.encode import Job
from megatron_tokenformer.data.fast_tokenizer import HARD_TEXTS, FastTokenizer, choose_backend, difference
from megatron_tokenformer.data.merging import merge_datasets
from megatron_tokenformer.data.preprocess import Options, preprocess
from megatron_tokenformer.data.tiktoken_tokenizer import KNOWN_FILES, PATTERNS, TikTokenizer
from megatron_tokenformer.data.tokenizer_training import train_tokenizer
from megatron_tokenformer.data.tokenizers import HFTokenizer, load_tokenizer
from megatron_tokenformer.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [path.read_text() for path in sorted(Path(fast_tokenizer.__file__).parent.glob("*.py"))]
ODD = ["née  für\t日本 🙂\n", "I'LL say 12345 don't\r\n\r\n  x", "a<|endoftext|>b", "e\u0301 \u200d ", "  "]
TEXTS = [*SOURCES, *ODD * 20]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "a.jsonl"
    path.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in TEXTS))
    return path


@pytest.fixture(scope="module")
def trained(corpus: Path) -> HFTokenizer:
    """A byte-level BPE as GPT-2's.  Its first id ends documents, the others are in the merges' order."""
    train_tokenizer([str(corpus)], "HFTokenizer", 1_200, str(corpus.parent / "t.json"))
    return HFTokenizer(str(corpus.parent / "t.json"))


@pytest.fixture(scope="module")
def ranks(trained: HFTokenizer) -> dict[bytes, int]:
    """The same as bytes and ranks, without the end of document.  Printable bytes stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    byte_of = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    byte_of |= {chr(256 + place): byte for place, byte in enumerate(others)}
    vocabulary = json.loads(Path(trained.model).read_text())["model"]["vocab"]
    del vocabulary["<|endoftext|>"]
    return {bytes(byte_of[char] for char in token): i - 1 for token, i in vocabulary.items()}


def write_ranks(path: Path, ranks: dict[bytes, int]) -> str:
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return str(path)


@pytest.fixture(scope="module")
def model(corpus: Path, ranks: dict[bytes, int]) -> str:
    return write_ranks(corpus.parent / "t.tiktoken", ranks)


def merged_by_rank(text: str, pattern: str, ranks: dict[bytes, int]) -> list[int]:
    """Byte-pair merging as in its definition: of all neighbours, always the pair of the lowest rank."""
    ids = []
    for piece in regex.findall(pattern, text):
        parts = [bytes([byte]) for byte in piece.encode()]
        while True:
            pairs = [ranks.get(left + right, len(ranks)) for left, right in itertools.pairwise(parts)]
            if not pairs or min(pairs) == len(ranks):
                break
            place = pairs.index(min(pairs))
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        ids += [ranks[part] for part in parts]
    return ids


@pytest.mark.parametrize("pattern", PATTERNS)
def test_ids_are_those_of_merging_by_rank(model: str, ranks: dict[bytes, int], pattern: str) -> None:
    tokenizer = load_tokenizer("TikTokenizer", model, pattern=pattern)
    for text in [*TEXTS[-5:], SOURCES[0][:3_000], *(text[:300] for text in HARD_TEXTS)]:
        ids = tokenizer.encode(text)
        assert ids == merged_by_rank(text, PATTERNS[pattern], ranks)
        assert tokenizer.decode([*ids, tokenizer.eod_id]) == text
    flat = tokenizer.encode_flat(TEXTS)
    assert flat.ids.dtype == flat.lengths.dtype == np.int32
    assert flat.ids.tolist() == [i for text in TEXTS for i in tokenizer.encode(text)]
    assert flat.lengths.tolist() == [len(tokenizer.encode(text)) for text in TEXTS]


def test_ids_are_those_of_the_tokenizer_json_that_the_ranks_come_from(
    model: str, trained: HFTokenizer
) -> None:
    tokenizer = load_tokenizer("TikTokenizer", model, pattern="gpt2")
    texts = [text for text in [*TEXTS, *HARD_TEXTS] if "<|endoftext|>" not in text]
    assert np.array_equal(tokenizer.encode_flat(texts).ids, trained.encode_flat(texts).ids - 1)


def test_patterns_and_known_files_are_those_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    from tiktoken_ext import openai_public

    files: list[str] = []

    def remember(url: str, expected_hash: str) -> dict[bytes, int]:
        files.append(expected_hash)
        return {}

    # The one thing replaced is the download.
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", remember)
    for name in ("r50k_base", "p50k_base", "cl100k_base", "o200k_base"):
        encoding = openai_public.ENCODING_CONSTRUCTORS[name]()
        pattern, end = KNOWN_FILES[files[-1]]
        assert encoding["pat_str"] == PATTERNS[pattern]
        assert encoding["special_tokens"]["<|endoftext|>"] == end
    assert set(files) == set(KNOWN_FILES)


def test_the_end_of_document_follows_the_last_rank_except_in_known_files(
    model: str, ranks: dict[bytes, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = TikTokenizer(model)
    assert (unknown.pattern, unknown.eod_id, unknown.vocab_size) == ("cl100k", len(ranks), len(ranks) + 1)
    content_hash = tiktoken_tokenizer.hash_of(Path(model).read_bytes())
    monkeypatch.setitem(KNOWN_FILES, content_hash, ("o200k", len(ranks) + 1))
    known = TikTokenizer(model)
    assert (known.pattern, known.eod_id, known.vocab_size) == ("o200k", len(ranks) + 1, len(ranks) + 2)
    assert TikTokenizer(model, "gpt2").pattern == "gpt2"


def test_another_pattern_or_end_of_document_is_another_tokenizer(
    model: str, ranks: dict[bytes, int], tmp_path: Path
) -> None:
    files = [model, write_ranks(tmp_path / "b", {**ranks, b"a rare token": len(ranks)})]
    prints = {TikTokenizer(file, pattern).fingerprint for file in files for pattern in PATTERNS}
    assert len(prints) == 6
    assert TikTokenizer(model).fingerprint == TikTokenizer(model, "cl100k").fingerprint


@pytest.fixture(scope="module", params=PATTERNS)
def both(request: pytest.FixtureRequest, model: str) -> tuple[TikTokenizer, FastTokenizer]:
    reference = TikTokenizer(model, request.param)
    return reference, FastTokenizer(reference)


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(codec="utf-8")))
def test_any_text_comes_back_and_holds_no_end_of_document(
    both: tuple[TikTokenizer, FastTokenizer], text: str
) -> None:
    texts = [text, f"{text}<|endoftext|>{text}"]
    for tokenizer in both:
        ids = [tokenizer.encode(text) for text in texts]
        assert tokenizer.eod_id not in ids[1]
        assert [tokenizer.decode(one) for one in ids] == texts
    assert difference(*both, texts) is None


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_fast_backend_gives_the_same_ids_and_can_be_pickled(model: str, pattern: str) -> None:
    reference = TikTokenizer(model, pattern)
    fast = choose_backend(reference, "auto", TEXTS)
    assert isinstance(fast, FastTokenizer)
    assert difference(reference, fast, [*TEXTS, *HARD_TEXTS]) is None
    for copy in (pickle.loads(pickle.dumps(fast)), pickle.loads(pickle.dumps(reference))):
        for name in ("eod_id", "vocab_size", "fingerprint", "options"):
            assert getattr(copy, name) == getattr(reference, name)
        assert copy.encode(TEXTS[0]) == reference.encode(TEXTS[0])
        assert copy.decode([*copy.encode("a<|endoftext|>b"), copy.eod_id]) == "a<|endoftext|>b"
    assert choose_backend(reference, "tiktoken", TEXTS) is reference


def test_a_text_on_which_the_library_gives_up_is_told(model: str) -> None:
    with pytest.raises(UserError, match="cannot encode a text of 1,500,000 characters, '     ") as caught:
        TikTokenizer(model, "o200k").encode_flat(["fine", " " * 1_500_000])
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda lines: [*lines, b"no rank"], "b'no rank' is not `base64 rank`"),
        (lambda lines: [*lines, b"YWI= 1 2"], "is not `base64 rank`"),
        (lambda lines: [*lines, b"YWI= x"], "is not `base64 rank`"),
        (lambda lines: [*lines, lines[0].split()[0] + b" 99999"], "tokens or ranks repeat"),
        (lambda lines: [*lines, b"eCB5IHog 7"], "tokens or ranks repeat"),
        (lambda lines: [*lines, b"eCB5IHog -7"], "a rank is negative"),
        (lambda lines: lines[:200], "bytes have no rank"),
        (lambda lines: [], "256 bytes have no rank"),
        (lambda lines: [b'[{"rank": 0, "token_bytes": "AA==", "token_str": ""}]'], "no .tiktoken file"),
    ],
)
def test_a_file_of_another_kind_is_refused(model: str, tmp_path: Path, change: object, reason: str) -> None:
    (tmp_path / "bad").write_bytes(b"\n".join(change(Path(model).read_bytes().splitlines())))
    with pytest.raises(UserError, match=reason):
        load_tokenizer("TikTokenizer", str(tmp_path / "bad"))


def test_an_unknown_pattern_is_refused(model: str) -> None:
    with pytest.raises(UserError, match="unknown pattern 'v2'; choose one of gpt2, cl100k, o200k"):
        load_tokenizer("TikTokenizer", model, pattern="v2")
    with pytest.raises(UserError, match=r"a pattern .* is for TikTokenizer only, not for ByteTokenizer"):
        load_tokenizer("ByteTokenizer", pattern="gpt2")


def test_the_output_is_the_same_for_any_backend_and_workers_and_other_patterns_are_not_merged(
    corpus: Path, model: str, tmp_path: Path
) -> None:
    outputs = set()
    for backend, workers in (("tiktoken", 1), ("tiktoken", 2), ("auto", 1), ("auto", 5)):
        job = Job("TikTokenizer", model, append_eod=True, tokenizer_backend=backend, tiktoken_pattern="o200k")
        output = str(tmp_path / f"{backend}{workers}")
        summary = preprocess([str(corpus)], output, job, Options(workers=workers)).datasets[0]
        outputs.add(tuple(Path(summary["prefix"] + suffix).read_bytes() for suffix in (".bin", ".idx")))
        assert summary["tokenizer"]["pattern"] == "o200k"
        assert summary["tokenizer"]["backend"].split()[0] == (
            "tiktoken" if backend == "tiktoken" else "fastokens"
        )
        assert summary["eod_inside_text"] == 0
    assert len(outputs) == 1
    job = Job("TikTokenizer", model, append_eod=True)
    other = preprocess([str(corpus)], str(tmp_path / "other"), job).datasets[0]
    with pytest.raises(UserError, match="tokenizers differ"):
        merge_datasets([summary["prefix"], other["prefix"]], str(tmp_path / "merged"))


def test_command_lines(corpus: Path, model: str, tmp_path: Path) -> None:
    def run(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "tools" / tool), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    kind = ("--tokenizer-type", "TikTokenizer", "--tokenizer-model", model)
    where = ("--input", str(corpus), "--output-prefix", str(tmp_path / "out"), "--workers", "1")
    done = run("preprocess_data.py", *where, *kind, "--tiktoken-pattern", "gpt2")
    assert done.returncode == 0, done.stderr
    shown = json.dumps(TEXTS[0], ensure_ascii=False)[:100]
    for arguments in ((), (*kind, "--tiktoken-pattern", "gpt2")):
        inspected = run("inspect_dataset.py", str(tmp_path / "out_text_document"), *arguments)
        assert shown in inspected.stdout, inspected.stderr
    refused = run("inspect_dataset.py", str(tmp_path / "out_text_document"), *kind)
    assert refused.returncode == 2 and "was made with another tokenizer" in refused.stderr
