"""Join datasets by copying bytes: many parts of one preprocessing become what one pass would have written."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from megatron_tokenformer.data.index_layout import parts
from megatron_tokenformer.data.indexed import TokenFileWriter
from megatron_tokenformer.data.inputs import parse_shard
from megatron_tokenformer.data.pair import Pair, open_pair, pair_paths, require_pair
from megatron_tokenformer.data.provenance import one_tokenizer, tokenizer_of
from megatron_tokenformer.data.sidecar import merge_sidecars, sidecar_path, write_sidecar
from megatron_tokenformer.errors import UserError

_BLOCK_BYTES = 4 << 20


class Merged(NamedTuple):
    """What was written: the pair's name, its counts, and whether a `.json` describes it."""

    prefix: str
    documents: int
    tokens: int
    described: bool


def merge_datasets(
    inputs: Sequence[str], output_prefix: str, *, overwrite: bool = False, log_interval: float = 1.0
) -> Merged:
    """Join datasets in the order given, a few megabytes at a time.

    Args:
        inputs: prefixes, the names of the pairs without `.bin`.
        output_prefix: the name of the new pair; its folder is made.
        overwrite: replace an existing pair, at the end and only if all went well.
        log_interval: seconds between updates of the progress bar.

    Raises:
        UserError: parts that are missing or do not belong together, an output that exists or is an input
            (exit code 2); a damaged part, a full disk (1).  Nothing new is then left under the final names.
    """
    _check_names(inputs, output_prefix, overwrite)
    found = [open_pair(prefix) for prefix in inputs]
    for other in found[1:]:
        _check_fit(found[0], other)
    sidecars = [part.sidecar for part in found if part.sidecar is not None]
    _check_shards(sidecars)
    total = sum(part.token_bytes + 12 * part.index.sequences + 8 * part.index.documents for part in found)
    try:
        with (
            TokenFileWriter(output_prefix, found[0].index.dtype) as writer,
            tqdm(total=total, unit="B", unit_scale=True, mininterval=log_interval, desc="merge") as bar,
        ):
            for part in found:
                _append(writer, part, bar.update)
            if sidecars:
                write_sidecar(output_prefix, merge_sidecars(sidecars, output_prefix))
            writer.finish()
    except OSError as error:
        name = error.filename or output_prefix
        raise UserError(f"cannot write {name}: {error.strerror}", exit_code=1) from error
    return Merged(output_prefix, writer.documents, writer.tokens, bool(sidecars))


def _check_names(inputs: Sequence[str], output: str, overwrite: bool) -> None:
    if not inputs:
        raise UserError("nothing to merge: give at least one input prefix")
    seen: dict[str, str] = {}
    for prefix in inputs:
        require_pair(prefix)
        real = os.path.realpath(pair_paths(prefix)[0])
        if real in seen:
            raise UserError(
                f"{prefix} is given twice (also as {seen[real]}); to see data more often, "
                "raise its weight in data.train"
            )
        seen[real] = prefix
    for path in (*pair_paths(output), sidecar_path(output)):
        real = os.path.realpath(path)
        if real in seen:
            raise UserError(f"the output {output} is also an input ({seen[real]}); choose another name")
        if os.path.exists(path) and not overwrite:
            raise UserError(f"{path} already exists; use --overwrite to replace it")


def _check_fit(first: Pair, other: Pair) -> None:
    """Refuse two parts that one pass could not have written."""
    if first.index.dtype != other.index.dtype:
        raise UserError(
            f"token types differ: {first.prefix} has {first.index.dtype}, {other.prefix} {other.index.dtype}"
        )
    if (first.sidecar is None) != (other.sidecar is None):
        bare, described = (first, other) if first.sidecar is None else (other, first)
        raise UserError(
            f"{sidecar_path(bare.prefix)} is missing, so its tokenizer cannot be held against that of "
            f"{described.prefix}; bring it, or merge only parts without a .json"
        )
    if first.sidecar is None or other.sidecar is None:
        return
    one_tokenizer((pair.prefix, tokenizer_of(pair.sidecar)) for pair in (first, other))
    for key in ("append_eod", "special_tokens_as_text"):
        if bool(first.sidecar.get(key)) != bool(other.sidecar.get(key)):
            made, bare = (first, other) if first.sidecar.get(key) else (other, first)
            raise UserError(f"{made.prefix} was made with --{key.replace('_', '-')}, {bare.prefix} without")


def _check_shards(sidecars: list[dict[str, Any]]) -> None:
    """Refuse shards of several runs, or not in order, and tell if some are missing."""
    shards = [parse_shard(sidecar["shard"]) for sidecar in sidecars if "shard" in sidecar]
    counts = {count for _, count in shards}
    if len(counts) > 1:
        told = ", ".join(f"{index}/{count}" for index, count in shards)
        raise UserError(f"shards {told} are of different runs, and hold some documents twice or not at all")
    if len(shards) != len(sidecars) or not counts:
        return
    (count,), given = counts, [index for index, _ in shards]
    if given != sorted(set(given)):
        told = ", ".join(map(str, given))
        raise UserError(f"shards {told} of {count} are not in order; give each once, 0 to {count - 1}")
    missing = sorted(set(range(count)) - set(given))
    if missing:
        told = ", ".join(map(str, missing))
        print(f"note: shards {told} of {count} are missing", file=sys.stderr)


def _append(writer: TokenFileWriter, part: Pair, report: Callable[[int], object]) -> None:
    """Copy one part, telling `report` the bytes done.

    Raises:
        UserError: the part cannot be read, or its index contradicts itself.
    """
    index, before, tokens_before = part.index, writer.sequences, writer.tokens
    for block in _read(_token_blocks(part), part.prefix):
        writer.append_tokens(block)
        report(block.nbytes)
    tokens, sound = 0, True
    for lengths in _read((index.lengths(*span) for span in parts(index.sequences)), part.prefix):
        tokens += int(lengths.sum(dtype=np.int64))
        sound = sound and int(lengths.min()) >= 0
        writer.append_lengths(lengths)
        report(12 * lengths.size)
    last = int(index.boundaries(0, 1)[0])
    sound = sound and last == 0
    spans = ((start + 1, count) for start, count in parts(index.documents))
    for ends in _read((index.boundaries(*span) for span in spans), part.prefix):
        sound = sound and bool((np.diff(ends, prepend=last) >= 0).all())
        writer.append_documents(before + ends)
        report(8 * ends.size)
        last = int(ends[-1])
    if not sound or tokens != writer.tokens - tokens_before or last != index.sequences:
        raise UserError(
            f"{part.prefix} is damaged: its files contradict each other; "
            f"`tokenformer inspect_dataset {part.prefix}` says where",
            exit_code=1,
        )


def _token_blocks(part: Pair) -> Iterator[np.ndarray]:
    with open(pair_paths(part.prefix)[0], "rb") as file:
        count = _BLOCK_BYTES // part.index.dtype.itemsize
        while (block := np.fromfile(file, part.index.dtype, count)).size:
            yield block


def _read(blocks: Iterator[np.ndarray], prefix: str) -> Iterator[np.ndarray]:
    """Pass `blocks` on; an error of the disk they come from must not be told as one of the output's."""
    try:
        yield from blocks
    except OSError as error:
        raise UserError(f"cannot read {error.filename or prefix}: {error.strerror}", exit_code=1) from error
