"""Which files a command reads: names and globs, in one order, or one node's share of them."""

from __future__ import annotations

import argparse
import glob
import os
import re
from collections.abc import Sequence
from itertools import accumulate

from megatron_tokenformer.errors import UserError

_SUFFIXES = tuple(f"{name}{packed}" for name in (".jsonl", ".json") for packed in ("", ".gz", ".zst"))


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
    """Expand file names and globs (`**` included) into the list of files to read.

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


def parse_shard(text: str) -> tuple[int, int]:
    """`"I/N"` as (I, N): part I of N, counted from 0.

    Raises:
        UserError: anything else.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not int(found[1]) < int(found[2]):
        raise UserError(f"--shard {text!r} is not I/N with I from 0 to N - 1")
    return int(found[1]), int(found[2])


def take_shard(paths: Sequence[str], shard: tuple[int, int]) -> list[str]:
    """One of N runs of neighbouring files, of about equal bytes, none empty.

    Datasets made of all of them, joined in their order, are what one pass over all files makes.

    Raises:
        UserError: fewer files than shards.
    """
    index, count = shard
    if len(paths) < count:
        raise UserError(
            f"--shard {index}/{count}: there are only {len(paths)} input files, and a file goes to one shard"
        )
    ends = list(accumulate(os.path.getsize(path) for path in paths))
    cuts = [0]
    for part in range(1, count):
        # The file border nearest to the even share, with a file at least for each shard before and after.
        share = ends[-1] * part / count
        nearest = min(range(len(paths)), key=lambda n: abs((ends[n - 1] if n else 0) - share))
        cuts.append(min(max(nearest, cuts[-1] + 1), len(paths) - (count - part)))
    return list(paths[cuts[index] : [*cuts, len(paths)][index + 1]])
