"""Tokenizers give the text back, encode batches as they encode texts, and explain what they cannot load."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tokenformer.data.tokenizer_training import train_tokenizer
from megatron_tokenformer.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer
from megatron_tokenformer.errors import UserError

TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "Grown models keep what they know.",
    "née  für\t日本 🙂\n",
] * 40


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "a.jsonl"
    path.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in TEXTS))
    return path


@pytest.fixture(scope="module", params=["HFTokenizer", "SentencePieceTokenizer", "ByteTokenizer"])
def tokenizer(request: pytest.FixtureRequest, corpus: Path) -> Tokenizer:
    if request.param == "ByteTokenizer":
        return load_tokenizer(request.param)
    model = corpus.parent / request.param
    size = train_tokenizer([str(corpus)], request.param, 300, str(model))
    loaded = load_tokenizer(request.param, str(model))
    assert loaded.vocab_size == size == 300
    assert loaded.fingerprint == hashlib.sha256(model.read_bytes()).hexdigest()
    return loaded


# Left out: surrogates are no text, U+2581 is sentencepiece's own space.
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\u2581"))))
def test_round_trip_and_batches(tokenizer: Tokenizer, texts: list[str]) -> None:
    ids, lengths = tokenizer.encode_flat(texts)
    assert ids.dtype == lengths.dtype == np.int32
    batch = [row.tolist() for row in np.split(ids, np.cumsum(lengths))[:-1]]
    assert batch == [tokenizer.encode(text) for text in texts]
    assert [tokenizer.decode(ids) for ids in batch] == texts
    assert all(0 <= i < tokenizer.vocab_size and i != tokenizer.eod_id for ids in batch for i in ids)


def test_the_end_of_document_gives_no_text(tokenizer: Tokenizer) -> None:
    assert 0 <= tokenizer.eod_id < tokenizer.vocab_size
    assert tokenizer.decode([*tokenizer.encode("abc"), tokenizer.eod_id]) == "abc"


def test_training_is_repeatable(corpus: Path, tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        train_tokenizer([str(corpus)], "HFTokenizer", 300, str(tmp_path / name))
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_truncation_and_padding_saved_in_a_file_are_ignored(corpus: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend

    path = str(tmp_path / "tokenizer.json")
    train_tokenizer([str(corpus)], "HFTokenizer", 260, path)
    backend = Backend.from_file(path)
    backend.enable_truncation(2)
    backend.enable_padding(length=5)
    backend.save(path)
    assert load_tokenizer("HFTokenizer", path).encode_flat(["z", "zqxjkvw"]).lengths.tolist() == [1, 7]


def test_an_unusual_end_of_document_is_found_when_it_is_the_only_special_token(tmp_path: Path) -> None:
    from tokenizers import AddedToken, models
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE(vocab={"a": 0}, merges=[]))
    path = str(tmp_path / "tokenizer.json")
    backend.save(path)
    with pytest.raises(UserError, match="no end-of-document token"):
        load_tokenizer("HFTokenizer", path)
    backend.add_special_tokens([AddedToken("[STOP]", special=True)])
    backend.save(path)
    assert load_tokenizer("HFTokenizer", path).eod_id == 1


def test_sentencepiece_without_end_of_sentence_is_refused(tmp_path: Path) -> None:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=39, eos_id=-1, minloglevel=2
    )
    path = tmp_path / "a.model"
    path.write_bytes(model.getvalue())
    with pytest.raises(UserError, match="no end-of-sentence piece"):
        load_tokenizer("SentencePieceTokenizer", str(path))


def test_what_cannot_be_loaded_is_explained(tmp_path: Path) -> None:
    junk = tmp_path / "junk"
    junk.write_text("no tokenizer")
    cases = [
        ("GPT5Tokenizer", None, "choose one of HFTokenizer"),
        ("HFTokenizer", None, "needs a model file"),
        ("HFTokenizer", str(tmp_path / "none.json"), "no tokenizer model at"),
        ("HFTokenizer", str(junk), "not a tokenizer.json"),
        ("SentencePieceTokenizer", str(junk), "not a sentencepiece model"),
    ]
    for kind, model, reason in cases:
        with pytest.raises(UserError, match=reason):
            load_tokenizer(kind, model)


def test_what_cannot_be_trained_is_explained(corpus: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": ""}\n')
    existing = tmp_path / "existing"
    existing.touch()
    cases = [
        (corpus, "ByteTokenizer", 300, "new", "cannot train"),
        (corpus, "HFTokenizer", 100, "new", "too small"),
        (corpus, "SentencePieceTokenizer", 9_999, "new", "sentencepiece cannot train 9999 pieces"),
        (corpus, "HFTokenizer", 300, "existing", "already exists"),
        (empty, "HFTokenizer", 300, "new", "no text in 1 input"),
        (empty, "SentencePieceTokenizer", 300, "new", "no text in 1 input"),
    ]
    for path, kind, size, output, reason in cases:
        with pytest.raises(UserError, match=reason):
            train_tokenizer([str(path)], kind, size, str(tmp_path / output))
        assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="cannot write"):
        train_tokenizer([str(corpus)], "HFTokenizer", 300, str(existing / "below-a-file"))


def test_bytes() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("é") == [0xC3, 0xA9]
    assert tokenizer.decode([0xC3, 256, 0x41]) == "\ufffdA"
