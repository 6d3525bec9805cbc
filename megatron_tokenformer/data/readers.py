"""Stream documents out of JSON-lines files (plain, gzip, zstd) in bounded memory.

Reading has two halves, so that the costly one can run in other processes: :func:`read_chunks` decompresses
and cuts at line ends, :func:`parse_chunk` decodes the lines of one chunk. Every error names file, line and
reason.
"""

from __future__ import annotations

import argparse
import glob
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import orjson

from megatron_tokenformer.errors import UserError

CHUNK_BYTES = 2 << 20
# Decompressors expand a whole block at once; a small block keeps even highly compressible input in bounds.
_BLOCK_BYTES = 64 << 10
_SAMPLED_FILES = 8
_SUFFIXES = tuple(f"{name}{packed}" for name in (".jsonl", ".json") for packed in ("", ".gz", ".zst"))
_UTF8_BOM = b"\xef\xbb\xbf"


class Chunk(NamedTuple):
    """Some whole lines of one file.

    Attributes:
        path: the file.
        first_line: the number of the first line, counted from 1.
        data: the lines, decompressed, as bytes.
        input_bytes: bytes of the file (compressed) that were read for this chunk; they add up to its size.
    """

    path: str
    first_line: int
    data: bytes
    input_bytes: int


class Document(NamedTuple):
    """One document and where it came from (``line`` counts from 1)."""

    path: str
    line: int
    text: str


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every command that reads JSON lines: `--input` and `--json-key`."""
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="files or quoted globs: .jsonl, .jsonl.gz, .jsonl.zst",
    )
    parser.add_argument(
        "--json-key", default="text", metavar="KEY", help="where a line's text is (default: text)"
    )


def expand_inputs(patterns: Sequence[str]) -> list[str]:
    """Expand file names and globs (``**`` included) into the list of files to read.

    Patterns keep their order, the matches of each are sorted, and a file that matches twice is read once.

    Raises:
        UserError: a pattern matches nothing, or a match is not a JSON-lines file.
    """
    paths: dict[str, None] = {}
    for pattern in patterns:
        # A file whose name holds brackets is meant literally, as a shell would have passed it.
        matches = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise UserError(f"no input file matches {pattern!r}")
        paths.update(dict.fromkeys(matches))
    for path in paths:
        if not os.path.isfile(path):
            raise UserError(f"input {path!r} is not a file")
        if not path.endswith(_SUFFIXES):
            raise UserError(f"input {path!r} does not end in one of {', '.join(_SUFFIXES)}")
    return list(paths)


def read_documents(paths: Iterable[str], key: str = "text") -> Iterator[Document]:
    """Yield every document of ``paths`` in order, holding one chunk in memory.

    Raises:
        UserError: see :func:`read_chunks` and :func:`parse_chunk`.
    """
    for path in paths:
        for chunk in read_chunks(path):
            yield from parse_chunk(chunk, key)


def read_chunks(path: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """Yield the decompressed file in chunks of whole lines, ``chunk_bytes`` or one line's end more each.

    Raises:
        UserError: the file cannot be read, or its compressed data are damaged or end too early.
    """
    taken = 0

    def count(size: int) -> None:
        nonlocal taken
        taken += size

    line, reported, pending, size = 1, 0, [], 0
    try:
        for block in _decompressed_blocks(path, count):
            pending.append(block)
            size += len(block)
            if size < chunk_bytes or b"\n" not in block:
                continue
            cut = block.rfind(b"\n") + 1
            data = b"".join([*pending[:-1], block[:cut]])
            yield Chunk(path, line, data, taken - reported)
            line, reported, pending, size = line + data.count(b"\n"), taken, [block[cut:]], len(block) - cut
    except (OSError, EOFError, zlib.error, _zstd_error()) as error:
        after = line + sum(block.count(b"\n") for block in pending) - 1
        where = f"{path}: after line {after}" if after else path
        raise UserError(f"{where}: {_reason(error)}", exit_code=1) from error
    yield Chunk(path, line, b"".join(pending), taken - reported)


def parse_chunk(chunk: Chunk, key: str = "text") -> Iterator[Document]:
    """Yield a chunk's documents: one JSON object a line, the text under ``key``; blank lines are skipped.

    Raises:
        UserError: invalid UTF-8, malformed JSON, not an object, or no string under ``key``.
    """
    data = chunk.data
    if chunk.first_line == 1 and data.startswith(_UTF8_BOM):
        data = data[len(_UTF8_BOM) :]
    for number, line in enumerate(data.split(b"\n"), chunk.first_line):
        if not line or line.isspace():
            continue
        try:
            text = orjson.loads(line)[key]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise UserError(f"{chunk.path}:{number}: {_diagnose(line, key)}", exit_code=1)
        yield Document(chunk.path, number, text)


def parse_texts(chunk: Chunk, key: str = "text") -> list[str]:
    """The texts of :func:`parse_chunk`, without the cost of an object for each document.

    Raises:
        UserError: as :func:`parse_chunk`.
    """
    try:
        texts = [orjson.loads(line)[key] for line in chunk.data.split(b"\n") if line]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        texts = [None]
    if not all(isinstance(text, str) for text in texts):
        # A blank line, a byte order mark, or an error, which the careful way finds and names.
        return [document.text for document in parse_chunk(chunk, key)]
    return texts


def sample_texts(paths: Sequence[str], key: str = "text", size: int = 256 << 10) -> list[str]:
    """Texts from the beginning of up to eight of the files, from about ``size`` bytes in all.

    For a look at the data before the pass over them: what cannot be read or parsed is passed over, for it is
    the pass that must tell. The beginning of a line that is too long is given as it is, JSON and all.
    """
    chosen = paths[:: -(-len(paths) // _SAMPLED_FILES)]
    return [text for path in chosen for text in _first_texts(path, key, size // len(chosen))]


def _first_texts(path: str, key: str, size: int) -> list[str]:
    head = b""
    with suppress(OSError, EOFError, zlib.error, _zstd_error()):
        for block in _decompressed_blocks(path, lambda _: None):
            head += block[:size]
            if len(head) >= size:
                break
    texts = []
    for line in head[:size].split(b"\n"):
        with suppress(orjson.JSONDecodeError, KeyError, TypeError):
            texts.append(orjson.loads(line)[key])
    return [text for text in texts if isinstance(text, str)] or [head[:size].decode("utf-8", "ignore")]


def _diagnose(line: bytes, key: str) -> str:
    """Say in words why ``line`` gives no text; kept apart so that good lines pay nothing for it."""
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"invalid UTF-8: byte {line[error.start]:#04x} at column {error.start + 1} of the line"
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return f"malformed JSON: {error}"
    if not isinstance(value, dict):
        return f"expected a JSON object with the key {key!r}, found {type(value).__name__}"
    if key not in value:
        return f"no key {key!r}; the object has {', '.join(map(repr, value)) or 'no keys'}"
    return f"the value of {key!r} is {type(value[key]).__name__}, not a string"


def _decompressed_blocks(path: str, count: Callable[[int], None]) -> Iterator[bytes]:
    """Yield the content of ``path`` block by block, telling ``count`` the bytes read from the disk."""
    with open(path, "rb") as file:
        blocks = _raw_blocks(file, count)
        if path.endswith(".gz"):
            yield from _decompress(blocks, lambda: zlib.decompressobj(wbits=31))
        elif path.endswith(".zst"):
            import zstandard

            # Archives packed with --long need more than the default window.
            decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
            yield from _decompress(blocks, decompressor.decompressobj)
        else:
            yield from blocks


def _raw_blocks(file: Any, count: Callable[[int], None]) -> Iterator[bytes]:
    while block := file.read(_BLOCK_BYTES):
        count(len(block))
        yield block


def _decompress(blocks: Iterator[bytes], new_frame: Callable[[], Any]) -> Iterator[bytes]:
    """Decompress a stream of any number of frames (gzip: members); EOFError if the last one is not finished.

    The stream readers of both libraries take a cut file for its end, so the frames are driven by hand.
    """
    frame, frames = None, 0
    for block in blocks:
        while block:
            if frame is None:
                frame, frames = new_frame(), frames + 1
            yield frame.decompress(block)
            if not frame.eof:
                break
            block, frame = frame.unused_data, None
    if frame is not None or frames == 0:
        raise EOFError


def _zstd_error() -> type[Exception]:
    import zstandard

    return zstandard.ZstdError


def _reason(error: Exception) -> str:
    if isinstance(error, EOFError):
        return "the compressed data end too early (a truncated file?)"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return f"damaged compressed data ({error})"
