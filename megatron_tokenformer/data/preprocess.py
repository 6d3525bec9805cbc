"""From JSON lines to Megatron token files, on several cores, in bounded memory, going on where it stopped.

The main thread decompresses and cuts at line ends (`readers`), workers parse and tokenize (`encode`), the
main thread writes what comes back, in order (`outputs`): the result is the same for any number of workers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any, NamedTuple

from tqdm import tqdm

from megatron_tokenformer.data.encode import Encoded, Job, Work, encode_all
from megatron_tokenformer.data.fast_tokenizer import choose_backend
from megatron_tokenformer.data.indexed import token_dtype
from megatron_tokenformer.data.inputs import expand_inputs, take_shard
from megatron_tokenformer.data.journal import Journal
from megatron_tokenformer.data.long_lines import read_pieces
from megatron_tokenformer.data.outputs import Names, Outputs
from megatron_tokenformer.data.problems import Tally
from megatron_tokenformer.data.readers import LongLine, read_chunks, sample_texts
from megatron_tokenformer.data.tokenizers import Tokenizer, load_tokenizer
from megatron_tokenformer.errors import UserError

ON_ERROR = ("fail", "skip")


class Options(NamedTuple):
    """How a run goes about it; none of this changes what is written for good input."""

    workers: int = 1
    """threads or processes that tokenize"""
    on_error: str = "fail"
    """`fail` stops at the first bad line or file, `skip` leaves them out and counts them"""
    shard: tuple[int, int] | None = None
    """(I, N) to read only part I of N of the inputs"""
    overwrite: bool = False
    """replace existing outputs, at the end and only if all went well"""
    restart: bool = False
    """do not go on where an unfinished run stopped"""
    log_interval: float = 1.0
    """seconds between updates of the progress bar"""


class Result(NamedTuple):
    """What was made."""

    datasets: list[dict[str, Any]]
    """the description of each one, as in its `.json`; `prefix` is its name"""
    problems: Tally
    """the bad input that was left out"""
    resumed: int
    """how many input files an earlier run had done"""


def preprocess(inputs: Sequence[str], output_prefix: str, job: Job, options: Options = Options()) -> Result:
    """Tokenize `inputs` into `PREFIX_<json_key>_document` `.bin`, `.idx` and `.json`.

    With `job.split_by` each component has files of its own, `PREFIX_<component>_<json_key>_document`.  A
    run that was stopped leaves a journal, and the same call goes on after the last finished input file.

    Args:
        inputs: file names or globs, see `inputs.expand_inputs`.
        output_prefix: the beginning of the output names; its folder is made.
        job: the tokenizer and what to take of a line.
        options: how to go about it.

    Raises:
        UserError: a wrong argument (exit code 2), or bad input, no documents, a full disk (1).  Nothing new
            is then left under the final names.
    """
    if options.workers < 1:
        raise UserError(f"workers must be at least 1, not {options.workers}")
    if options.on_error not in ON_ERROR:
        raise UserError(f"unknown on_error {options.on_error!r}; choose one of {', '.join(ON_ERROR)}")
    paths = expand_inputs(inputs)
    if options.shard:
        paths = take_shard(paths, options.shard)
    os.makedirs(os.path.dirname(output_prefix) or ".", exist_ok=True)
    # The workers are the parallelism: threads of each one's tokenizer would only get in their way.
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "FASTOKENS_BPE_THREADS": "1"}
    tokenizer = load_tokenizer(
        job.tokenizer_type,
        job.tokenizer_model,
        merges=job.merge_file,
        pattern=job.tiktoken_pattern,
        special_as_text=job.special_as_text,
    )
    journal = Journal(
        f"{output_prefix}_{job.json_key}_document.journal",
        {"tokenizer": tokenizer.fingerprint, **_settings(job)},
    )
    identities = [_identity(path) for path in paths]
    try:
        if options.restart:
            journal.drop()
        published = journal.publish(identities)
        if published:
            return Result(published, Tally(published[0].get("problems")), len(paths))
        names = Names(output_prefix, job.json_key, options.overwrite)
        if not job.split_by:
            names.of("")  # refuses what exists already
        tokenizer = choose_backend(tokenizer, job.tokenizer_backend, sample_texts(paths, job.json_key))
        return _run(identities, journal, names, job, tokenizer, options)
    except OSError as error:
        name = error.filename or output_prefix
        raise UserError(f"cannot write {name}: {error.strerror}", exit_code=1) from error
    except BrokenProcessPool as error:
        raise UserError("a worker process died; out of memory? Try fewer --workers", exit_code=1) from error


def _run(
    identities: list[list[Any]],
    journal: Journal,
    names: Names,
    job: Job,
    tokenizer: Tokenizer,
    options: Options,
) -> Result:
    paths = [path for path, _, _ in identities]
    sizes = [size for _, size, _ in identities]
    done = journal.read(identities, skipping=options.on_error == "skip")
    resumed = len(done.inputs)
    eod_id = tokenizer.eod_id if job.append_eod else None
    with (
        Outputs(names, token_dtype(tokenizer.vocab_size), eod_id, journal, done) as outputs,
        tqdm(
            total=sum(sizes),
            initial=sum(sizes[:resumed]),
            unit="B",
            unit_scale=True,
            mininterval=options.log_interval,
            desc="tokenize",
        ) as bar,
    ):
        work = _read(paths[resumed:], tokenizer, job, os.path.dirname(journal.path) or ".")
        identity = iter(identities[resumed:])
        show = partial(_show, bar, outputs, time.monotonic(), outputs.tokens)
        for encoded in encode_all(work, tokenizer, job, options.workers):
            if encoded.problems and options.on_error == "fail":
                raise encoded.problems[0].error()
            outputs.add(encoded)
            if encoded.ends_file:
                outputs.finish_input(next(identity))
            show(encoded)
        if outputs.documents == 0:
            skipped = "".join(f"; skipped: {line}" for line in outputs.problems.lines())
            raise UserError(f"no documents in {len(paths)} input file(s), e.g. {paths[0]}{skipped}", 1)
        descriptions = _describe(outputs, job, tokenizer, identities, options)
        outputs.publish(descriptions)
    return Result(list(descriptions.values()), outputs.problems, resumed)


def _read(paths: Sequence[str], tokenizer: Tokenizer, job: Job, spool_folder: str) -> Iterator[Work]:
    """All chunks of all files, long lines in pieces."""

    def fits(left: str, right: str) -> bool:
        return tokenizer.encode(left + right) == tokenizer.encode(left) + tokenizer.encode(right)

    for path in paths:
        for chunk in read_chunks(path, spool_folder=spool_folder):
            if isinstance(chunk, LongLine):
                yield from read_pieces(chunk, job.fields, fits)
            else:
                yield chunk


def _show(bar: tqdm, outputs: Outputs, start: float, tokens_before: int, encoded: Encoded) -> None:
    rate = (outputs.tokens - tokens_before) / max(time.monotonic() - start, 1e-9)
    bar.set_postfix(documents=f"{outputs.documents:,}", tokens_per_s=f"{rate:,.0f}", refresh=False)
    bar.update(encoded.input_bytes)


def _identity(path: str) -> list[Any]:
    found = os.stat(path)
    return [path, found.st_size, found.st_mtime_ns]


def _settings(job: Job) -> dict[str, Any]:
    """What the outputs depend on besides inputs and tokenizer; recorded in every description."""
    settings = {
        "append_eod": job.append_eod,
        "json_key": job.json_key,
        "special_tokens_as_text": job.special_as_text,
    }
    return settings | ({"split_by": job.split_by} if job.split_by else {})


def _describe(
    outputs: Outputs, job: Job, tokenizer: Tokenizer, identities: list[list[Any]], options: Options
) -> dict[str, dict[str, Any]]:
    """The description of each dataset, by component."""
    common = {
        "dtype": str(token_dtype(tokenizer.vocab_size)),
        **_settings(job),
        "tokenizer": {
            "type": job.tokenizer_type,
            "backend": tokenizer.backend,
            "model": job.tokenizer_model,
            **tokenizer.options,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eod_id": tokenizer.eod_id,
        },
        **({"shard": "{}/{}".format(*options.shard)} if options.shard else {}),
        "inputs": [{"path": path, "bytes": size} for path, size, _ in identities],
        **({"problems": outputs.problems.as_json()} if outputs.problems else {}),
    }
    return {
        component: {**vars(counts), **({"component": component} if component else {}), **common}
        for component, counts in outputs.counts.items()
        if counts.documents
    }
