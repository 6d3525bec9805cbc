"""Stream JSON-lines files (plain, gzip, zstd) in bounded memory, as chunks of whole lines.

Reading has two halves, so that the costly one can run on other cores: `read_chunks` decompresses and
cuts at line ends, `lines.parse_lines` decodes the lines of one chunk.  What is wrong is told with file, line
and reason, beside what is good.
"""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, BinaryIO, NamedTuple

import orjson

from megatron_tokenformer.data import problems as kinds
from megatron_tokenformer.data.lines import Fields, parse_lines
from megatron_tokenformer.data.problems import Problem
from megatron_tokenformer.errors import UserError

CHUNK_BYTES = 1 << 20
# A line beyond this goes to a file, and its text through the workers in pieces.
LONG_LINE_BYTES = 8 << 20
_BLOCK_BYTES = 128 << 10
# zstd expands all that it is given at once, and 4 bytes can stand for 128 KB: this many give at most 32 MB.
_ZSTD_BYTES = 1 << 10
_SAMPLED_FILES = 8


class Chunk(NamedTuple):
    """Some whole lines of one file."""

    path: str
    """the file"""
    first_line: int
    """the number of the first line, counted from 1"""
    data: bytes
    """the lines, decompressed, as bytes"""
    input_bytes: int
    """bytes of the file (compressed) that were read for this chunk; they add up to its size"""
    problem: Problem | None = None
    """why nothing of the file can be read after these lines"""
    ends_file: bool = False
    """whether they are the last ones"""


class LongLine(NamedTuple):
    """One line that is too long to be held in memory, without its end; use it before taking the next chunk.

    Path, first line and bytes are as in a `Chunk`.
    """

    path: str
    first_line: int
    file: BinaryIO
    """the line, from the file's beginning to its end; closed when the next chunk is taken"""
    input_bytes: int


def read_texts(
    paths: Iterable[str], key: str = "text", report: Callable[[int], object] = lambda _: None
) -> Iterator[str]:
    """Yield the text of every document of `paths` in order, holding one chunk in memory.

    Args:
        report: told how many bytes of the files have been read since it was told last.

    Raises:
        UserError: the first bad line or file.
    """
    for path in paths:
        for chunk in read_chunks(path):
            data = chunk.file.read() if isinstance(chunk, LongLine) else chunk.data
            parsed = parse_lines(data, path, chunk.first_line, Fields(key))
            for problem in parsed.problems:
                raise problem.error()
            yield from parsed.texts
            if isinstance(chunk, Chunk) and chunk.problem:
                raise chunk.problem.error()
            report(chunk.input_bytes)


def read_chunks(
    path: str,
    chunk_bytes: int = CHUNK_BYTES,
    long_line_bytes: int = LONG_LINE_BYTES,
    spool_folder: str | None = None,
) -> Iterator[Chunk | LongLine]:
    """Yield the decompressed file in chunks of whole lines, `chunk_bytes` or one line more each.

    A line of more than `long_line_bytes` comes alone, in a file in `spool_folder`.  The last chunk,
    perhaps empty, says that it is the last, and what is wrong with a file that cannot be read to its end.
    """
    reader = _Reader(path, chunk_bytes, long_line_bytes, spool_folder)
    try:
        yield from reader.chunks()
    except (OSError, EOFError, zlib.error, _zstd_error()) as error:
        yield reader.rest(error)
    else:
        yield reader.rest(None)


class _Reader:
    """The state of reading one file: what is decompressed and not yet given out, and where that is."""

    def __init__(self, path: str, chunk_bytes: int, long_line_bytes: int, spool_folder: str | None) -> None:
        self.path, self.chunk_bytes, self.long_line_bytes = path, chunk_bytes, long_line_bytes
        self.spool_folder = spool_folder
        self.line, self.pending, self.size = 1, list[bytes](), 0
        self.taken = self.reported = 0

    def chunks(self) -> Iterator[Chunk | LongLine]:
        """All but the last chunk."""
        blocks = _decompressed_blocks(self.path, self._take)
        for block in blocks:
            self.pending.append(block)
            self.size += len(block)
            if self.size < self.chunk_bytes:
                continue
            if b"\n" in block:
                yield self._cut(self.pending[:-1], block)
            elif self.size > self.long_line_bytes:
                joined = b"".join(self.pending)
                if b"\n" in joined:
                    yield self._cut([], joined)
                else:
                    yield from self._spool(blocks)

    def rest(self, error: Exception | None) -> Chunk:
        """The last chunk: what is left, up to the last whole line if reading ended with an error."""
        data = b"".join(self.pending)
        problem = None
        if error is not None:
            data = data[: data.rfind(b"\n") + 1]
            kind, reason = _words(error)
            after = self.line + data.count(b"\n") - 1
            where = f"{self.path}: after line {after}" if after else self.path
            problem = Problem(kind, f"{where}: {reason}")
        return Chunk(self.path, self.line, data, self._report(), problem, ends_file=True)

    def _take(self, size: int) -> None:
        self.taken += size

    def _report(self) -> int:
        taken, self.reported = self.taken - self.reported, self.taken
        return taken

    def _cut(self, before: list[bytes], block: bytes) -> Chunk:
        """Give out all whole lines; `block` has a line's end, `before` is what comes before it."""
        cut = block.rfind(b"\n") + 1
        data = b"".join([*before, memoryview(block)[:cut]])
        chunk = Chunk(self.path, self.line, data, self._report())
        self.line += data.count(b"\n")
        self.pending, self.size = [block[cut:]], len(block) - cut
        return chunk

    def _spool(self, blocks: Iterator[bytes]) -> Iterator[LongLine]:
        """Put the line that is pending into a file, and give it out when its end has come."""
        with tempfile.TemporaryFile(dir=self.spool_folder) as file:
            for block in self.pending:
                _write(file, block)
            self.pending, self.size = [], 0
            for block in blocks:
                end = block.find(b"\n")
                _write(file, block if end < 0 else block[:end])
                if end >= 0:
                    self.pending, self.size = [block[end + 1 :]], len(block) - end - 1
                    break
            file.seek(0)
            yield LongLine(self.path, self.line, file, self._report())
            self.line += 1


def sample_texts(paths: Sequence[str], key: str = "text", size: int = 256 << 10) -> list[str]:
    """Texts from the beginning of up to eight of the files, from about `size` bytes in all.

    For a look at the data before the pass over them: what cannot be read or parsed is passed over, for it is
    the pass that must tell.  The beginning of a line that is too long is given as it is, JSON and all.
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


def _decompressed_blocks(path: str, count: Callable[[int], None]) -> Iterator[bytes]:
    """Yield the content of `path` block by block, telling `count` the bytes read from the disk."""
    # Unbuffered: the blocks are large already, and a buffer would copy each once more.
    with open(path, "rb", buffering=0) as file:
        blocks = _raw_blocks(file, count)
        if path.endswith(".gz"):
            yield from _decompress(blocks, _GzipMember)
        elif path.endswith(".zst"):
            yield from _decompress(blocks, _ZstdFrame)
        else:
            yield from blocks


def _raw_blocks(file: Any, count: Callable[[int], None]) -> Iterator[bytes]:
    while block := file.read(_BLOCK_BYTES):
        count(len(block))
        yield block


def _decompress(
    blocks: Iterator[bytes], new_frame: Callable[[], _GzipMember | _ZstdFrame]
) -> Iterator[bytes]:
    """Decompress a stream of any number of frames (gzip: members); EOFError if the last one is not finished.

    The stream readers of both libraries take a cut file for its end, so the frames are driven by hand.
    """
    frame, frames = None, 0
    for block in blocks:
        while block:
            if frame is None:
                # Behind a frame, zeros are padding.
                block = block.lstrip(b"\0") if frames else block
                if not block:
                    break
                frame, frames = new_frame(), frames + 1
            yield from frame.expand(block)
            if not frame.ended:
                break
            block, frame = frame.unused, None
    if frame is not None or frames == 0:
        raise EOFError


class _GzipMember:
    """One member of a `.gz`, expanded in blocks of bounded size."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)

    @property
    def ended(self) -> bool:
        return self._inner.eof

    @property
    def unused(self) -> bytes:
        """What came after its end."""
        return self._inner.unused_data

    def expand(self, block: bytes) -> Iterator[bytes]:
        while block and not self._inner.eof:
            yield self._inner.decompress(block, CHUNK_BYTES)
            block = self._inner.unconsumed_tail


class _ZstdFrame:
    """One frame of a `.zst`, likewise."""

    def __init__(self) -> None:
        import zstandard

        # Archives packed with --long need more than the default window.
        self._inner = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        self.unused = b""

    @property
    def ended(self) -> bool:
        return self._inner.eof

    def expand(self, block: bytes) -> Iterator[bytes]:
        for start in range(0, len(block), _ZSTD_BYTES):
            data = self._inner.decompress(block[start : start + _ZSTD_BYTES])
            for cut in range(0, len(data), CHUNK_BYTES):
                yield data[cut : cut + CHUNK_BYTES] if len(data) > CHUNK_BYTES else data
            if self._inner.eof:
                self.unused = self._inner.unused_data + block[start + _ZSTD_BYTES :]
                return


def _write(file: BinaryIO, data: bytes) -> None:
    try:
        file.write(data)
    except OSError as error:  # not one of the input, for which it would be taken
        raise UserError(f"cannot put a long line into a temporary file: {error.strerror}", 1) from error


def _zstd_error() -> type[Exception]:
    import zstandard

    return zstandard.ZstdError


def _words(error: Exception) -> tuple[str, str]:
    """The kind of a file's problem, and the reason."""
    if isinstance(error, EOFError):
        return kinds.TRUNCATED, "the compressed data end too early (a truncated file?)"
    if isinstance(error, OSError):
        return kinds.UNREADABLE, error.strerror or str(error)
    return kinds.DAMAGED, f"damaged compressed data ({error})"
