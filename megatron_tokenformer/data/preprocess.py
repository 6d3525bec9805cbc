"""From JSON lines to a Megatron token file, on several cores, in bounded memory.

The parent decompresses and cuts at line ends, workers parse and tokenize, the parent writes what comes back,
in order: the result is the same for any number of workers.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from megatron_tokenformer.data.fast_tokenizer import FastTokenizer, choose_backend
from megatron_tokenformer.data.indexed import TokenFileWriter, pair_paths, token_dtype
from megatron_tokenformer.data.readers import Chunk, expand_inputs, parse_texts, read_chunks, sample_texts
from megatron_tokenformer.data.sidecar import SidecarWriter, sidecar_path
from megatron_tokenformer.data.tokenizers import Tokenizer, load_tokenizer
from megatron_tokenformer.errors import UserError

# fastokens works without Python's lock, so up to this many workers can be threads: they start at once, share
# its caches, and send nothing through pipes. Parsing does need the lock; more workers must be processes.
_MOST_THREADS = 4


class Job(NamedTuple):
    """What a worker must know to encode a chunk; the fields are those of the command line."""

    tokenizer_type: str
    tokenizer_model: str | None
    json_key: str = "text"
    append_eod: bool = False
    tokenizer_backend: str = "auto"
    merge_file: str | None = None
    tiktoken_pattern: str | None = None
    special_as_text: bool = False


class Encoded(NamedTuple):
    """A chunk's tokens ``[tokens]``, the lengths ``[documents]`` of its documents, and what to count."""

    tokens: np.ndarray
    lengths: np.ndarray
    input_bytes: int
    text_bytes: int
    empty_texts: int
    eod_inside_text: int


def preprocess(
    inputs: Sequence[str],
    output_prefix: str,
    job: Job,
    *,
    workers: int = 1,
    overwrite: bool = False,
    log_interval: float = 1.0,
) -> dict[str, Any]:
    """Tokenize ``inputs`` into ``PREFIX_<json_key>_document`` ``.bin``, ``.idx`` and ``.json``.

    Args:
        inputs: file names or globs, see :func:`~megatron_tokenformer.data.readers.expand_inputs`.
        output_prefix: the beginning of the output names; its folder is made.
        job: the tokenizer and how to use it.
        workers: threads or processes that tokenize, see :func:`_start_pool`.
        overwrite: replace existing outputs, at the end and only if all went well.
        log_interval: seconds between updates of the progress bar.

    Returns:
        What was written to the ``.json``: counts, tokenizer, inputs, and ``prefix``, the name of the pair.

    Raises:
        UserError: a wrong argument (exit code 2), or bad input, no documents, a full disk (1). Nothing new is
            then left under the final names.
    """
    if workers < 1:
        raise UserError(f"workers must be at least 1, not {workers}")
    paths = expand_inputs(inputs)
    prefix = f"{output_prefix}_{job.json_key}_document"
    existing = [path for path in (*pair_paths(prefix), sidecar_path(prefix)) if os.path.exists(path)]
    if existing and not overwrite:
        raise UserError(f"{existing[0]} already exists; use --overwrite to replace it")
    # The workers are the parallelism: threads of each one's tokenizer would only get in their way.
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "FASTOKENS_BPE_THREADS": "1"}
    tokenizer = load_tokenizer(
        job.tokenizer_type,
        job.tokenizer_model,
        merges=job.merge_file,
        pattern=job.tiktoken_pattern,
        special_as_text=job.special_as_text,
    )
    tokenizer = choose_backend(tokenizer, job.tokenizer_backend, sample_texts(paths, job.json_key))
    try:
        return _write_outputs(paths, prefix, job, tokenizer, workers, log_interval)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or prefix}: {error.strerror}", exit_code=1) from error
    except BrokenProcessPool as error:
        raise UserError("a worker process died; out of memory? Try fewer --workers", exit_code=1) from error


def encode_chunk(chunk: Chunk, tokenizer: Tokenizer, job: Job) -> Encoded:
    """Parse and tokenize the documents of a chunk. Texts that give no token are left out and counted.

    Raises:
        UserError: a bad line.
    """
    texts = parse_texts(chunk, job.json_key)
    ids, lengths = tokenizer.encode_flat([text for text in texts if text])
    lengths = lengths[lengths > 0]
    # An end of document spelled out in a text forges a boundary: Megatron's ids are kept, but it is told.
    forged = int(np.count_nonzero(ids == tokenizer.eod_id))
    assert not ids.size or ids.max() < tokenizer.vocab_size, "an id beyond the vocabulary"
    empty = len(texts) - lengths.size
    tokens = ids.astype(token_dtype(tokenizer.vocab_size))
    if job.append_eod:
        tokens = np.insert(tokens, np.cumsum(lengths), tokenizer.eod_id)
        lengths = lengths + 1
    # Python knows at no cost which texts are ASCII; only the others are encoded to be counted.
    text_bytes = sum(len(text) if text.isascii() else len(text.encode("utf-8")) for text in texts)
    return Encoded(tokens, lengths, chunk.input_bytes, text_bytes, empty, forged)


def _write_outputs(
    paths: list[str], prefix: str, job: Job, tokenizer: Tokenizer, workers: int, log_interval: float
) -> dict[str, Any]:
    counts = {"text_bytes": 0, "empty_texts": 0, "eod_inside_text": 0}
    sizes = [os.path.getsize(path) for path in paths]
    chunks = (chunk for path in paths for chunk in read_chunks(path))
    with (
        TokenFileWriter(prefix, token_dtype(tokenizer.vocab_size)) as writer,
        tqdm(total=sum(sizes), unit="B", unit_scale=True, mininterval=log_interval, desc="tokenize") as bar,
    ):
        start = time.monotonic()
        encoded_chunks = _encode_all(chunks, tokenizer, job, workers)
        for encoded in encoded_chunks:
            writer.add(encoded.tokens, encoded.lengths)
            for name in counts:
                counts[name] += getattr(encoded, name)
            rate = writer.tokens / max(time.monotonic() - start, 1e-9)
            bar.set_postfix(documents=f"{writer.documents:,}", tokens_per_s=f"{rate:,.0f}", refresh=False)
            bar.update(encoded.input_bytes)
        if writer.documents == 0:
            raise UserError(f"no documents in {len(paths)} input file(s), e.g. {paths[0]}", exit_code=1)
        summary = {
            "prefix": prefix,
            "documents": writer.documents,
            "tokens": writer.tokens,
            **counts,
            "dtype": str(writer.dtype),
            "append_eod": job.append_eod,
            "special_tokens_as_text": job.special_as_text,
            "json_key": job.json_key,
            "tokenizer": _describe(tokenizer, job),
            "inputs": [{"path": path, "bytes": size} for path, size in zip(paths, sizes, strict=True)],
        }
        with SidecarWriter(prefix, summary) as sidecar:
            writer.finish()
            sidecar.finish()
    return summary


def _describe(tokenizer: Tokenizer, job: Job) -> dict[str, Any]:
    return {
        "type": job.tokenizer_type,
        "backend": getattr(tokenizer, "backend", None),
        "model": job.tokenizer_model,
        **tokenizer.options,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
    }


def _encode_all(chunks: Iterator[Chunk], tokenizer: Tokenizer, job: Job, workers: int) -> Iterator[Encoded]:
    """Encode the chunks in order, with a bounded number of them in flight."""
    if workers == 1:
        yield from (encode_chunk(chunk, tokenizer, job) for chunk in chunks)
        return
    pool, encode = _start_pool(tokenizer, job, workers)
    try:
        in_flight: deque[Future[Encoded]] = deque()
        for chunk in chunks:
            in_flight.append(pool.submit(encode, chunk))
            if len(in_flight) > 2 * workers:
                yield in_flight.popleft().result()
        while in_flight:
            yield in_flight.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start_pool(tokenizer: Tokenizer, job: Job, workers: int) -> tuple[Executor, Callable[[Chunk], Encoded]]:
    """Workers, and the function to submit to them: a few threads if that will do, else processes."""
    if isinstance(tokenizer, FastTokenizer) and workers <= _MOST_THREADS:
        return ThreadPoolExecutor(workers), lambda chunk: encode_chunk(chunk, tokenizer, job)
    # Forked by a server: this process has threads by now (progress bar, tokenizer), whose locks a fork would
    # copy held. The server has this module imported already.
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


def _encode_in_worker(chunk: Chunk) -> Encoded:
    assert _worker is not None, "the pool's initializer has not run"
    return encode_chunk(chunk, *_worker)
