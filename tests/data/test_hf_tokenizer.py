"""tokenizer.json and GPT-2's pair of files: the right ids, and special tokens as text if that is wanted."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tokenformer.data import hf_tokenizer
from megatron_tokenformer.data.encode import Job
from megatron_tokenformer.data.fast_tokenizer import HARD_TEXTS, FastTokenizer, choose_backend, difference
from megatron_tokenformer.data.preprocess import Options, preprocess
from megatron_tokenformer.data.tokenizer_training import train_tokenizer
from megatron_tokenformer.data.tokenizers import FlatIds, HFTokenizer, Tokenizer, load_tokenizer
from megatron_tokenformer.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
FORGED = "one<|endoftext|>two <|endoftext|> <|pad|><|endoftext|>\nthree"
TEXTS = [
    Path(hf_tokenizer.__file__).read_text(),
    FORGED,
    "née  für\t日本 🙂\n",
    "I'll say 12345, don't\r\n\r\n  x ",
    "a    b <tool>c",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "a.jsonl"
    path.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in TEXTS * 3))
    return path


@pytest.fixture(scope="module")
def model(corpus: Path) -> str:
    path = str(corpus.parent / "tokenizer.json")
    train_tokenizer([str(corpus)], "HFTokenizer", 800, path)
    return path


@pytest.fixture(scope="module")
def gpt2_files(corpus: Path, model: str) -> tuple[str, str]:
    """The same tokenizer as vocab.json and merges.txt."""
    from tokenizers import Tokenizer as Backend

    vocabulary, merges = Backend.from_file(model).model.save(str(corpus.parent))
    return vocabulary, merges


def edited(model: str, path: Path, change: Callable[[object], object]) -> str:
    """A copy of the tokenizer of `model`, changed by a function of the library's object."""
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(model)
    change(backend)
    backend.save(str(path))
    return str(path)


@pytest.fixture(scope="module")
def with_added_tokens(corpus: Path, model: str) -> str:
    from tokenizers import AddedToken

    def add(backend: object) -> None:
        backend.add_special_tokens([AddedToken("<|pad|>", special=True)])
        backend.add_tokens([AddedToken("    ", normalized=False), AddedToken("<tool>")])

    return edited(model, corpus.parent / "added.json", add)


def test_gpt2_files_give_the_ids_of_their_tokenizer_json(model: str, gpt2_files: tuple[str, str]) -> None:
    vocabulary, merges = gpt2_files
    pair = load_tokenizer("GPT2BPETokenizer", vocabulary, merges=merges)
    single = load_tokenizer("HFTokenizer", model)
    assert (pair.vocab_size, pair.eod_id) == (single.vocab_size, single.eod_id)
    texts = [*TEXTS, *HARD_TEXTS]
    assert all(map(np.array_equal, pair.encode_flat(texts), single.encode_flat(texts)))
    assert pair.decode([*pair.encode(TEXTS[2]), pair.eod_id]) == TEXTS[2]
    fast = choose_backend(pair, "fastokens", TEXTS)
    copy = pickle.loads(pickle.dumps(fast))
    assert copy.options == {"merges": merges} and copy.fingerprint == pair.fingerprint
    assert all(map(np.array_equal, copy.encode_flat(texts), single.encode_flat(texts)))


def test_each_of_gpt2s_files_counts_for_the_fingerprint(gpt2_files: tuple[str, str], tmp_path: Path) -> None:
    vocabulary, merges = map(Path, gpt2_files)
    fewer = tmp_path / "merges.txt"
    fewer.write_text("\n".join(merges.read_text().split("\n")[:-20]))
    spaced = tmp_path / "vocab.json"
    spaced.write_text(vocabulary.read_text() + " ")
    pairs = [(vocabulary, merges), (vocabulary, fewer), (spaced, merges)]
    assert len({HFTokenizer(str(first), str(second)).fingerprint for first, second in pairs}) == 3


def test_gpt2_files_that_are_missing_or_bad_are_explained(
    gpt2_files: tuple[str, str], model: str, tmp_path: Path
) -> None:
    vocabulary, merges = gpt2_files
    without_end = tmp_path / "without.json"
    without_end.write_text('{"a": 0}')
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe")
    cases = [
        (vocabulary, None, "needs a merge file"),
        (vocabulary, str(tmp_path / "none"), "no tokenizer model at .*none"),
        (merges, merges, "is not GPT-2's vocab.json"),
        (str(without_end), merges, "no end-of-document token"),
        (vocabulary, vocabulary, "is not a vocab.json with its merges.txt"),
        (vocabulary, str(binary), "is not GPT-2's merges.txt"),
    ]
    for first, second, reason in cases:
        with pytest.raises(UserError, match=reason):
            load_tokenizer("GPT2BPETokenizer", first, merges=second)
    with pytest.raises(UserError, match=r"a merge file .* is for GPT2BPETokenizer only, not for HFTokenizer"):
        load_tokenizer("HFTokenizer", model, merges=merges)


def test_the_command_line_takes_megatrons_options_for_gpt2_files(
    corpus: Path, model: str, gpt2_files: tuple[str, str], tmp_path: Path
) -> None:
    vocabulary, merges = gpt2_files
    arguments = ["--vocab-file", vocabulary, "--merge-file", merges, "--tokenizer-type", "GPT2BPETokenizer"]
    arguments += ["--input", str(corpus), "--output-prefix", str(tmp_path / "out"), "--workers", "1"]
    command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    job = Job("HFTokenizer", model)
    expected = preprocess([str(corpus)], str(tmp_path / "expected"), job).datasets[0]["prefix"]
    assert (tmp_path / "out_text_document.bin").read_bytes() == Path(f"{expected}.bin").read_bytes()
    described = json.loads((tmp_path / "out_text_document.json").read_text())["tokenizer"]
    assert (described["model"], described["merges"]) == (vocabulary, merges)


def test_the_vocabulary_reaches_the_largest_id_where_ids_are_left_out(model: str, tmp_path: Path) -> None:
    definition = json.loads(Path(model).read_text())
    size = len(definition["model"]["vocab"])
    definition["model"]["vocab"]["a rare token"] = size + 100
    (tmp_path / "t.json").write_text(json.dumps(definition))
    assert HFTokenizer(model).vocab_size == size
    assert HFTokenizer(str(tmp_path / "t.json")).vocab_size == size + 101


@pytest.fixture(scope="module", params=["huggingface", "fastokens"])
def as_text(request: pytest.FixtureRequest, with_added_tokens: str) -> Tokenizer:
    tokenizer = load_tokenizer("HFTokenizer", with_added_tokens, special_as_text=True)
    chosen = choose_backend(tokenizer, request.param, TEXTS)
    return pickle.loads(pickle.dumps(chosen))


def test_special_tokens_as_text_come_back_as_text(as_text: Tokenizer) -> None:
    for text in (FORGED, "<|endoftext|>", "<|pad|>", "<|endoftext|>" * 50):
        ids = as_text.encode(text)
        assert as_text.eod_id not in ids
        assert as_text.decode([*ids, as_text.eod_id]) == text
        assert ids == as_text.encode_flat([text]).ids.tolist()


def test_added_tokens_that_are_not_special_stay_what_they_are(
    as_text: Tokenizer, with_added_tokens: str
) -> None:
    parsed = load_tokenizer("HFTokenizer", with_added_tokens)
    text = "a    b <tool>c"
    assert as_text.encode(text) == parsed.encode(text)
    assert len(set(as_text.encode("    <tool>"))) == 2
    assert as_text.encode(FORGED) != parsed.encode(FORGED)


_PIECES = st.one_of(
    st.text(st.characters(codec="utf-8")), st.sampled_from(["<|endoftext|>", "<|pad|>", " ", "<|"])
)


@pytest.fixture(scope="module")
def both(with_added_tokens: str) -> tuple[HFTokenizer, FastTokenizer]:
    reference = HFTokenizer(with_added_tokens, special_as_text=True)
    return reference, FastTokenizer(reference)


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.lists(_PIECES).map("".join)))
def test_both_backends_agree_on_special_tokens_as_text(
    both: tuple[HFTokenizer, FastTokenizer], texts: list[str]
) -> None:
    reference, fast = both
    assert difference(reference, fast, texts) is None
    ids, lengths = reference.encode_flat(texts)
    assert reference.eod_id not in ids.tolist()
    assert [reference.decode(part) for part in np.split(ids, np.cumsum(lengths))[:-1]] == texts


def test_the_check_of_the_fast_backend_includes_the_tokens_that_the_file_adds(
    with_added_tokens: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    honest = FastTokenizer.encode_unaided

    def wrong(self: FastTokenizer, texts: list[str]) -> FlatIds:
        ids, lengths = honest(self, texts)
        return FlatIds(ids + np.int32(any("<tool>" in text for text in texts)), lengths)

    monkeypatch.setattr(FastTokenizer, "encode_unaided", wrong)
    reference = HFTokenizer(with_added_tokens)
    assert choose_backend(reference, "auto", ["abc"]) is reference
    assert "instead of fastokens: other ids for 'a<|endoftext|>a" in capfd.readouterr().err


def test_an_end_of_document_that_cannot_be_text_is_refused(model: str, tmp_path: Path) -> None:
    definition = json.loads(Path(model).read_text())
    for token in definition["added_tokens"]:
        token["special"] = False
    (tmp_path / "t.json").write_text(json.dumps(definition))
    assert HFTokenizer(str(tmp_path / "t.json")).eod_id == 0
    with pytest.raises(
        UserError, match=r"cannot encode '<\|endoftext\|>' as text, for it is not marked as special"
    ):
        HFTokenizer(str(tmp_path / "t.json"), special_as_text=True)


def test_no_text_forges_an_end_of_document_when_special_tokens_are_text(
    corpus: Path, with_added_tokens: str, tmp_path: Path
) -> None:
    counts, outputs = {}, {}
    for name, special_as_text, backend, workers in (
        ("parsed", False, "auto", 1),
        ("text", True, "auto", 1),
        ("text in processes", True, "auto", 5),
        ("text, reference", True, "huggingface", 1),
    ):
        job = Job(
            "HFTokenizer",
            with_added_tokens,
            append_eod=True,
            tokenizer_backend=backend,
            special_as_text=special_as_text,
        )
        summary = preprocess([str(corpus)], str(tmp_path / name), job, Options(workers=workers)).datasets[0]
        counts[name] = summary["eod_inside_text"]
        outputs[name] = Path(f"{summary['prefix']}.bin").read_bytes()
        assert (
            json.loads(Path(f"{summary['prefix']}.json").read_text())["special_tokens_as_text"]
            is special_as_text
        )
    texts = [orjson.loads(line)["text"] for line in corpus.read_bytes().splitlines()]
    assert counts.pop("parsed") == sum(text.count("<|endoftext|>") for text in texts) > 0
    assert set(counts.values()) == {0}
    assert outputs["text"] == outputs["text in processes"] == outputs["text, reference"] != outputs["parsed"]


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "ByteTokenizer"])
def test_other_tokenizers_never_look_for_special_tokens(kind: str, corpus: Path, tmp_path: Path) -> None:
    path = None
    if kind == "SentencePieceTokenizer":
        path = str(tmp_path / "t.model")
        train_tokenizer([str(corpus)], kind, 400, path)
    text = "a</s>b<s><unk><|endoftext|>"
    for special_as_text in (False, True):
        tokenizer = load_tokenizer(kind, path, special_as_text=special_as_text)
        assert tokenizer.eod_id not in tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
