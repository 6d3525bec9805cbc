"""Text that appears id by id is the text of all ids, in whole characters, up to a stop text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_tokenformer.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer
from megatron_tokenformer.evaluation.text_stream import BROKEN, TextStream
from tests.evaluation.models import byte_level_bpe, sentencepiece_model

HARD = "the cat \U0001f600\U0001f468\u200d\U0001f469 sat  on\n\u65e5\u672c\u8a9e e\u0301 the mat \u00e9\u20ac"
KINDS = ["ByteTokenizer", "HFTokenizer", "SentencePieceTokenizer"]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "ByteTokenizer":
        return ByteTokenizer()
    make = byte_level_bpe if request.param == "HFTokenizer" else sentencepiece_model
    return load_tokenizer(request.param, make(folder))


@pytest.mark.parametrize("prompt", ["the", "", "hello there \u65e5", "a\n"])
def test_pieces_are_whole_characters_and_together_the_text(tokenizer: Tokenizer, prompt: str) -> None:
    before, ids = tokenizer.encode(prompt), tokenizer.encode(prompt + HARD)
    assert ids[: len(before)] == before, "the prompt's ids begin the text's"
    stream = TextStream(tokenizer, before)
    pieces = [stream.push(token) for token in ids[len(before) :]]
    assert not any(BROKEN in piece for piece in pieces)
    assert sum(bool(piece) for piece in pieces) > 15, "it appears bit by bit"
    pieces.append(stream.end())
    whole = tokenizer.decode(ids)
    assert "".join(pieces) == whole[len(tokenizer.decode(before)) :]
    assert pieces[-1] == "", "nothing is held back at the end of whole characters"


def test_ids_of_any_kind_give_the_text_that_all_of_them_give(tokenizer: Tokenizer) -> None:
    random = np.random.default_rng(3)
    for _ in range(30):
        ids = random.integers(0, tokenizer.vocab_size, size=25).tolist()
        stream = TextStream(tokenizer, ids[:5])
        text = "".join(stream.push(token) for token in ids[5:]) + stream.end()
        # How many marks a decoder puts for broken bytes is its own affair.
        whole = tokenizer.decode(ids).replace(BROKEN, "")
        assert whole.endswith(text.replace(BROKEN, ""))


def test_a_character_that_is_not_finished_is_told_at_the_end() -> None:
    stream = TextStream(ByteTokenizer(), [])
    assert [stream.push(byte) for byte in "\u20ac".encode()[:2]] == ["", ""]
    assert stream.end() == BROKEN


@pytest.mark.parametrize(
    "text, stops, expected",
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two t"], "one "),
        ("ababac", ["abac"], "ab"),
        ("aab", ["aab"], ""),
        ("one tw", ["two"], "one tw"),
        ("x\n\ny", ["\n\n"], "x"),
        ("\u65e5\u672c\u8a9e", ["\u672c"], "\u65e5"),
    ],
)
def test_nothing_of_a_stop_text_is_shown(text: str, stops: list[str], expected: str) -> None:
    stream = TextStream(ByteTokenizer(), [], stops)
    shown = ""
    for byte in text.encode():
        shown += stream.push(byte)
        assert expected.startswith(shown)
    assert shown + stream.end() == expected
    assert stream.stopped == (expected != text)


def test_a_tokenizers_files_are_real(tmp_path: Path) -> None:
    piece = load_tokenizer("SentencePieceTokenizer", sentencepiece_model(tmp_path))
    assert len(piece.encode("\u65e5")) > 2, "what it does not know becomes bytes"
    bpe = load_tokenizer("HFTokenizer", byte_level_bpe(tmp_path))
    assert len(bpe.encode("the cat")) < 7, "it has merges"
