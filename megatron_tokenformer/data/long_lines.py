"""Documents too long for memory: their text as pieces that together have the same tokens.

A piece of a JSON string is a JSON string again, as long as no escape and no character is cut.  A tokenizer
gives two pieces the ids that it gives the whole if nothing of it reaches over the cut.  So text is cut at the
end of a word, where every usual splitting of text into words has a border, and only where the tokenizer gives
the surroundings the same ids in two pieces as in one.  (A unigram model of sentencepiece sums the scores
of a whole text in single precision, so that on millions of ids its own choices waver: there a piece can
differ from the whole.)
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from functools import partial
from typing import BinaryIO, NamedTuple

import orjson

from megatron_tokenformer.data.lines import BadLine, Fields, decode_line, document, numbered_lines
from megatron_tokenformer.data.problems import Problem
from megatron_tokenformer.data.readers import Chunk, LongLine

_BLOCK_BYTES = 1 << 20
# Shorter strings stay in the line; only one beyond this is worth taking apart.
_LONG_STRING_BYTES = 1 << 20
_PIECE_BYTES = 2 << 20
# What ends a word; it goes with what follows, for white space is split by what comes after it.
_NEWLINE = b"\\n"
_MARKS = (b" ", _NEWLINE, b"\\r", "。".encode(), b"\\u3002")
_TRIED_CUTS, _TRIED_FITS = 1_000, 40
_CONTEXT_BYTES = 512
_LONGEST_ESCAPE = len(r"\ud83d\ude00")
_SECOND_HALVES = (b"dc", b"dd", b"de", b"df")
_BACKSLASH, _SPACE = b"\\ "

Fits = Callable[[str, str], bool]


class TextPiece(NamedTuple):
    """A part of one document's text."""

    text: bytes
    """the part as a JSON string, with its quotes"""
    component: str
    """of the document"""
    input_bytes: int
    """bytes of the file that were read for it"""
    ends_document: bool
    """whether it is the last one"""


def read_pieces(line: LongLine, fields: Fields, fits: Fits) -> Iterator[TextPiece | Chunk]:
    """Yield a long line's text in pieces; or a chunk with the problem, if it is a bad line.

    Args:
        line: where it is; read twice.
        fields: what is wanted of it.
        fits: whether the tokenizer gives two texts, left and right, the ids that it gives them joined.
    """
    try:
        skeleton, strings = _take_out_strings(line.file)
        text = component = ""
        for _, bare in numbered_lines(skeleton, line.first_line):
            text, component = document(decode_line(bare), fields)
        # All long strings are decoded, the text's for its pieces, the others to see that they are sound.
        found = {mark: list(_find_cuts(line.file, *span, fits)) for mark, span in strings.items()}
        cuts = found.get(text, [])
    except BadLine as error:
        kind, reason = error.args
        problem = Problem(kind, f"{line.path}:{line.first_line}: {reason}")
        yield Chunk(line.path, line.first_line, b"", line.input_bytes, problem)
        return
    if not cuts:  # it is something else that is long
        yield Chunk(line.path, line.first_line, skeleton, line.input_bytes)
        return
    start = strings[text][0]
    for number, cut in enumerate(cuts, 1):
        line.file.seek(start)
        piece = b'"%b"' % line.file.read(cut - start)
        last = number == len(cuts)
        # All of the line's bytes count with its end.
        yield TextPiece(piece, component, line.input_bytes if last else 0, last)
        start = cut


def _take_out_strings(file: BinaryIO) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """A line with a short mark in place of each long string, and where (start, stop) what is marked stands.

    So `orjson` judges the line and finds the keys, without its long strings in memory.
    """
    kept: list[bytes] = []
    strings: dict[str, tuple[int, int]] = {}
    done = 0
    for start, stop in _strings(file):
        if stop - start > _LONG_STRING_BYTES:
            mark = secrets.token_hex(16)
            strings[mark] = start, stop
            kept += _read(file, done, start), mark.encode()
            done = stop
    file.seek(done)
    return b"".join([*kept, file.read()]), strings


def _strings(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Where (start, stop), without their quotes, the strings of a line stand; the last may have no end."""
    offset, opened, carried = 0, -1, b""
    while True:
        file.seek(offset + len(carried))
        read = file.read(_BLOCK_BYTES)
        if not read:
            return
        block = carried + read
        # Backslashes at the end stay together with what they escape.
        body = block.rstrip(b"\\")
        at = 0
        while (quote := body.find(b'"', at)) >= 0:
            at = quote + 1
            if opened < 0:
                opened = offset + at
            elif not _is_escaped(body, quote):
                yield opened, offset + quote
                opened = -1
        offset, carried = offset + len(body), block[len(body) :]


def _is_escaped(block: bytes, place: int) -> bool:
    first = place
    while first and block[first - 1] == _BACKSLASH:
        first -= 1
    return (place - first) % 2 == 1


def _find_cuts(file: BinaryIO, start: int, stop: int, fits: Fits) -> Iterator[int]:
    """The ends of the pieces of the string at [start, stop), each decoded once to see that it is sound.

    Raises:
        BadLine: it is not.
    """
    block = b""
    while start + len(block) < stop:
        wanted = max(_PIECE_BYTES, len(block) + len(block) // 2)
        block += _read(file, start + len(block), min(stop, start + wanted))
        cut = len(block) if start + len(block) == stop else _cut(block, fits)
        if not cut:
            continue  # no good place: the piece gets longer
        try:
            decode_line(b'"%b"' % block[:cut])
        except BadLine as error:
            kind, reason = error.args
            reason = reason.replace("of the line", "of a part")
            raise BadLine(kind, f"{reason} (the part begins at byte {start + 1} of the line)") from None
        yield start + cut
        start, block = start + cut, block[cut:]


def _cut(block: bytes, fits: Fits) -> int:
    """The last good place to cut the block at, or 0."""
    places = {mark: block.rfind(mark, 0, len(block) - _CONTEXT_BYTES) for mark in _MARKS}
    misfits = 0
    for _ in range(_TRIED_CUTS):
        mark, place = max(places.items(), key=lambda item: item[1])
        if place < _CONTEXT_BYTES or misfits == _TRIED_FITS:
            break
        # Only this one has to be looked for again; one that is nowhere is looked for once.
        places[mark] = block.rfind(mark, 0, place)
        if _ends_word(block[place - 2 : place]):
            if _fits_at(block, place, fits):
                return place
            misfits += 1
    return 0


def _ends_word(before: bytes) -> bool:
    """Whether neither a space nor a short escape, which may be white space too, stands here."""
    return before[:1] != b"\\" and before[1:] not in (b" ", b"\\")


def _fits_at(block: bytes, cut: int, fits: Fits) -> bool:
    """Whether what surrounds the cut has the same ids in two pieces as in one."""
    start = next(filter(partial(_is_safe, block), range(cut - _CONTEXT_BYTES, cut)), cut)
    stop = next(filter(partial(_is_safe, block), range(cut + _CONTEXT_BYTES - 1, cut, -1)), cut)
    if start == cut or stop == cut:
        return False
    try:
        left, right = (orjson.loads(b'"%b"' % part) for part in (block[start:cut], block[cut:stop]))
    except orjson.JSONDecodeError:
        return False  # a bad text; decoding it all will tell how
    return fits(left, right)


def _is_safe(block: bytes, place: int) -> bool:
    """Whether a piece of a JSON string may begin here: not inside of a character, nor of an escape."""
    if block[place] == _SPACE:
        return True
    before = block[max(0, place - _LONGEST_ESCAPE) : place]
    if before[-2:] == _NEWLINE and before[-3:-2] != b"\\":
        return True
    if block[place : place + 2] == b"\\u":
        # The second half of a pair of escapes belongs to the first.
        return before[-1:] != b"\\" and block[place + 2 : place + 4].lower() not in _SECOND_HALVES
    return block[place] & 0xC0 != 0x80 and b"\\" not in before


def _read(file: BinaryIO, start: int, stop: int) -> bytes:
    file.seek(start)
    return file.read(stop - start)
