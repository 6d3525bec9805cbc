"""The workers' part of preprocessing: lines to token ids, on several cores, in order, in bounded memory."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from itertools import groupby
from multiprocessing import get_context, parent_process
from typing import NamedTuple

import numpy as np
import orjson

from megatron_tokenformer.data.fast_tokenizer import FastTokenizer
from megatron_tokenformer.data.indexed import token_dtype
from megatron_tokenformer.data.lines import Fields, parse_lines
from megatron_tokenformer.data.long_lines import TextPiece
from megatron_tokenformer.data.problems import Problem
from megatron_tokenformer.data.readers import Chunk
from megatron_tokenformer.data.tokenizers import Tokenizer

# fastokens works without Python's lock, so up to this many workers can be threads: they start at once and
# send nothing through pipes.  Parsing does need the lock, and each thread has caches of up to 120 MB, of
# which one process shall not hold many; more workers are processes.
_MOST_THREADS = 2
# Chunks under way beyond those being worked on: enough for all to be busy while the oldest is awaited.
_WAITING = 4

Work = Chunk | TextPiece


class Job(NamedTuple):
    """What a worker must know to encode a chunk; the fields are those of the command line."""

    tokenizer_type: str
    tokenizer_model: str | None
    json_key: str = "text"
    append_eod: bool = False
    tokenizer_backend: str = "auto"
    split_by: str | None = None
    merge_file: str | None = None
    tiktoken_pattern: str | None = None
    special_as_text: bool = False

    @property
    def fields(self) -> Fields:
        """What is wanted of a line."""
        return Fields(self.json_key, self.split_by)


class Part(NamedTuple):
    """Tokens of one component: [tokens] of the output's type, and what to count."""

    component: str
    """its name; `""` if all go together"""
    tokens: np.ndarray
    """the documents one after another, each with its end if that is wanted"""
    lengths: np.ndarray | None
    """[documents] of them; None for a piece of one document"""
    text_bytes: int
    empty_texts: int
    eod_inside_text: int


class Encoded(NamedTuple):
    """What a worker makes of a chunk or a piece; see there."""

    parts: list[Part]
    problems: list[Problem]
    input_bytes: int
    ends_file: bool
    ends_document: bool = False


def encode(work: Work, tokenizer: Tokenizer, job: Job) -> Encoded:
    """Parse and tokenize.  Texts that give no token are left out and counted, as are bad lines."""
    if isinstance(work, TextPiece):
        text: str = orjson.loads(work.text)
        part = _encode_texts([text], work.component, tokenizer, append_eod=False)
        piece = part._replace(lengths=None, empty_texts=0)
        return Encoded([piece], [], work.input_bytes, False, work.ends_document)
    texts, components, problems = parse_lines(work.data, work.path, work.first_line, job.fields)
    if job.split_by:
        # Stable: the documents of a component stay in order.
        pairs = sorted(zip(components, texts, strict=True), key=lambda pair: pair[0])
        groups = [(name, [text for _, text in group]) for name, group in groupby(pairs, lambda pair: pair[0])]
    else:
        groups = [("", texts)]
    parts = [_encode_texts(group, name, tokenizer, job.append_eod) for name, group in groups]
    if work.problem:
        problems.append(work.problem)
    return Encoded(parts, problems, work.input_bytes, work.ends_file)


def _encode_texts(texts: list[str], component: str, tokenizer: Tokenizer, append_eod: bool) -> Part:
    ids, lengths = tokenizer.encode_flat([text for text in texts if text])
    lengths = lengths[lengths > 0]
    # An end of document spelled out in a text forges a boundary: Megatron's ids are kept, but it is told.
    forged = int(np.count_nonzero(ids == tokenizer.eod_id))
    if forged:  # but for those of the tokenizer's own template
        forged -= tokenizer.encode("").count(tokenizer.eod_id) * lengths.size
    assert not ids.size or ids.max() < tokenizer.vocab_size, "an id beyond the vocabulary"
    empty = len(texts) - lengths.size
    tokens = ids.astype(token_dtype(tokenizer.vocab_size))
    if append_eod:
        tokens = np.insert(tokens, np.cumsum(lengths), tokenizer.eod_id)
        lengths = lengths + 1
    # Python knows at no cost which texts are ASCII; only the others are encoded to be counted.
    text_bytes = sum(len(text) if text.isascii() else len(text.encode("utf-8")) for text in texts)
    return Part(component, tokens, lengths, text_bytes, empty, forged)


def encode_all(work: Iterator[Work], tokenizer: Tokenizer, job: Job, workers: int) -> Iterator[Encoded]:
    """Encode in order, with a bounded number of chunks in flight; see `_start_pool`."""
    if workers == 1:
        yield from (encode(chunk, tokenizer, job) for chunk in work)
        return
    pool, submitted = _start_pool(tokenizer, job, workers)
    try:
        in_flight: deque[Future[Encoded]] = deque()
        for chunk in work:
            in_flight.append(pool.submit(submitted, chunk))
            if len(in_flight) >= workers + _WAITING:
                yield in_flight.popleft().result()
        while in_flight:
            yield in_flight.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start_pool(tokenizer: Tokenizer, job: Job, workers: int) -> tuple[Executor, Callable[[Work], Encoded]]:
    """Workers, and the function to submit to them: a few threads if that will do, else processes."""
    if isinstance(tokenizer, FastTokenizer) and workers <= _MOST_THREADS:
        return ThreadPoolExecutor(workers), lambda work: encode(work, tokenizer, job)
    # Forked by a server: this process has threads by now (progress bar, tokenizer), whose locks a fork would
    # copy held.  The server has this module imported already.
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(tokenizer, job))
    return pool, _encode_in_worker


_worker: tuple[Tokenizer, Job] | None = None


def _start_worker(tokenizer: Tokenizer, job: Job) -> None:
    global _worker
    # Ctrl-C reaches the whole process group; the parent alone answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _worker = tokenizer, job


def _leave_with_parent() -> None:
    """End a worker whose parent was killed; the pool itself would leave it waiting for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(work: Work) -> Encoded:
    assert _worker is not None, "the pool's initializer has not run"
    return encode(work, *_worker)
