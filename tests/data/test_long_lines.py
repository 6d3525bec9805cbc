"""A document too long for memory: its pieces have the tokens of the whole, and bad ones are named."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tokenformer.data import long_lines, problems
from megatron_tokenformer.data.fast_tokenizer import HARD_TEXTS, choose_backend
from megatron_tokenformer.data.lines import Fields
from megatron_tokenformer.data.long_lines import TextPiece, read_pieces
from megatron_tokenformer.data.readers import Chunk, LongLine
from megatron_tokenformer.data.tokenizer_training import train_tokenizer
from megatron_tokenformer.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer
from tests.data.runs import json_lines

SPLIT = Fields("text", "meta.set")
WORDS = "the tokens grow naïve 3.14 x+=1; 日本語 don't 👍🏽 \"quoted\" a\\b I'll".split()
ENDS = [" "] * 12 + ["\n", "\n\n", "  ", " \n", "\t", ". ", ", ", ".\n"]


@pytest.fixture(autouse=True, scope="module")
def small_pieces() -> object:
    """What is megabytes in use is a few hundred bytes here."""
    sizes = {"_BLOCK_BYTES": 300, "_LONG_STRING_BYTES": 800, "_PIECE_BYTES": 2_000, "_CONTEXT_BYTES": 128}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in sizes.items():
            patch.setattr(long_lines, name, value)
        yield


@pytest.fixture(scope="module", params=["HFTokenizer", "SentencePieceTokenizer", "fastokens"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "a.jsonl").write_bytes(json_lines([prose(20_000, seed=1)]))
    kind = "SentencePieceTokenizer" if request.param == "SentencePieceTokenizer" else "HFTokenizer"
    train_tokenizer([str(folder / "a.jsonl")], kind, 400, str(folder / "model"))
    loaded = load_tokenizer(kind, str(folder / "model"))
    return choose_backend(loaded, "fastokens", []) if request.param == "fastokens" else loaded


def prose(length: int, seed: int) -> str:
    """Words, numbers, code and other scripts, broken into lines in all ways."""
    generator = random.Random(seed)
    pieces = [generator.choice(WORDS) + generator.choice(ENDS) for _ in range(length // 5)]
    return "".join(pieces)


def as_line(data: bytes) -> LongLine:
    return LongLine("a.jsonl", 7, io.BytesIO(data), 1234)


def same_ids(tokenizer: Tokenizer) -> Callable[[str, str], bool]:
    encode = tokenizer.encode
    return lambda left, right: encode(left + right) == encode(left) + encode(right)


@pytest.mark.parametrize("ascii_only", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_pieces_have_the_ids_of_the_whole(tokenizer: Tokenizer, seed: int, ascii_only: bool) -> None:
    text = prose(20_000, seed)
    data = json.dumps({"text": text, "meta": {"set": "B"}}, ensure_ascii=ascii_only).encode()
    pieces = list(read_pieces(as_line(data), SPLIT, same_ids(tokenizer)))
    assert all(isinstance(piece, TextPiece) and piece.component == "B" for piece in pieces)
    texts = [orjson.loads(piece.text) for piece in pieces]
    assert len(texts) > 5
    assert max(len(piece.text) for piece in pieces) < 5_000
    assert "".join(texts) == text
    assert [i for part in texts for i in tokenizer.encode(part)] == tokenizer.encode(text)
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert sum(piece.input_bytes for piece in pieces) == 1234


@pytest.mark.parametrize("ascii_only", [False, True])
@pytest.mark.parametrize(
    "sentence",
    ["Слова без конца строки ", "日本語の文章。", "слово,\n", "1,2.5,x\n", "한국어 문장 ", "word\r\nword "],
)
def test_texts_of_other_scripts_and_tables_are_cut_too(
    tokenizer: Tokenizer, sentence: str, ascii_only: bool
) -> None:
    text = sentence * (9_000 // len(sentence))
    data = json.dumps({"text": text}, ensure_ascii=ascii_only).encode()
    pieces = list(read_pieces(as_line(data), Fields(), same_ids(tokenizer)))
    texts = [orjson.loads(piece.text) for piece in pieces]
    assert len(texts) > 2
    assert "".join(texts) == text
    assert [i for part in texts for i in tokenizer.encode(part)] == tokenizer.encode(text)


def test_a_place_to_cut_is_looked_for_once_and_not_for_ever() -> None:
    tried = []
    data = orjson.dumps({"text": "слова " * 5_000})
    (piece,) = read_pieces(as_line(data), Fields(), lambda left, right: bool(tried.append(left)))
    assert piece.ends_document
    # The blocks grow by half each time, from 2,000 bytes to 55,000, and each is tried a few times.
    assert len(tried) <= 10 * long_lines._TRIED_FITS
    assert all(tried)


def test_hard_texts_have_the_ids_of_the_whole(tokenizer: Tokenizer) -> None:
    text = " word ".join(HARD_TEXTS)
    data = orjson.dumps({"text": text})
    pieces = [orjson.loads(p.text) for p in read_pieces(as_line(data), Fields(), same_ids(tokenizer))]
    assert "".join(pieces) == text
    assert [i for part in pieces for i in tokenizer.encode(part)] == tokenizer.encode(text)


def test_a_text_without_a_place_to_cut_stays_whole() -> None:
    text = "x" * 9_000
    (piece,) = read_pieces(as_line(orjson.dumps({"text": text})), Fields(), same_ids(ByteTokenizer()))
    assert orjson.loads(piece.text) == text
    text = "two words " * 900
    (piece,) = read_pieces(as_line(orjson.dumps({"text": text})), Fields(), lambda left, right: False)
    assert orjson.loads(piece.text) == text


hard = '"\\\\\n\u00e9 a'
values = st.recursive(
    st.one_of(
        st.none(), st.integers(-9, 9), st.text(max_size=6), st.text(hard, min_size=900, max_size=1_000)
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text('"\\a', max_size=3), inner)),
    max_leaves=4,
)


@settings(max_examples=60, deadline=None)
@given(
    text=st.one_of(st.text(hard, max_size=50), st.text(hard + "\U0001f600", min_size=700, max_size=1_500)),
    meta=values,
    ascii_only=st.booleans(),
)
def test_any_json_gives_the_text_that_a_json_library_finds(text: str, meta: object, ascii_only: bool) -> None:
    data = json.dumps({"a": meta, "text": text, "meta": meta}, ensure_ascii=ascii_only).encode()
    found = list(read_pieces(as_line(data), Fields(), same_ids(ByteTokenizer())))
    if isinstance(found[0], TextPiece):
        assert "".join(orjson.loads(piece.text) for piece in found) == text
    else:
        (chunk,) = found
        assert chunk.problem is None
        assert orjson.loads(chunk.data)["text"] == text


LONG = b"two words " * 300


@pytest.mark.parametrize(
    ("data", "kind", "reason"),
    [
        (b'{"text": "' + LONG, problems.MALFORMED_JSON, "malformed JSON"),
        (b'{"text": "' + LONG + b'"', problems.MALFORMED_JSON, "malformed JSON"),
        (b'{"text": "' + LONG + b'\xff more"}', problems.INVALID_UTF8, "byte 0xff"),
        (b'{"text": "' + LONG + b"\\x" + LONG + b'"}', problems.MALFORMED_JSON, "begins at byte"),
        (b'{"text": "' + LONG + b'", "x": "' + LONG + b'\xff"}', problems.INVALID_UTF8, "byte 0xff"),
        (b'{"body": "' + LONG + b'"}', problems.NO_TEXT, "the object has 'body'"),
        (b'["' + LONG + b'"]', problems.NO_OBJECT, "found list"),
        (b'{"text": 1, "body": "' + LONG + b'"}', problems.TEXT_NO_STRING, "int, not a string"),
    ],
)
def test_a_bad_long_line_is_one_problem_and_no_piece(data: bytes, kind: str, reason: str) -> None:
    (chunk,) = read_pieces(as_line(data), Fields(), same_ids(ByteTokenizer()))
    assert isinstance(chunk, Chunk)
    assert chunk.data == b""
    assert chunk.problem.kind == kind
    assert chunk.problem.message.startswith("a.jsonl:7: ")
    assert reason in chunk.problem.message


def test_a_byte_order_mark_and_a_blank_line_are_as_in_short_lines() -> None:
    data = b'\xef\xbb\xbf{"text": "' + LONG + b'"}'
    pieces = list(read_pieces(as_line(data)._replace(first_line=1), Fields(), same_ids(ByteTokenizer())))
    assert "".join(orjson.loads(piece.text) for piece in pieces) == LONG.decode()
    (chunk,) = read_pieces(as_line(b" " * 5_000), Fields(), same_ids(ByteTokenizer()))
    assert chunk.problem is None
