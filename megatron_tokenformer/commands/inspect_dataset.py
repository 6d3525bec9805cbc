"""Print what is in a dataset (a .bin/.idx pair), and verify that its files agree with each other."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import sys
from dataclasses import asdict
from typing import Any

import numpy as np

from megatron_tokenformer.commands.command_line import CommandParser
from megatron_tokenformer.data.indexed import TokenFile
from megatron_tokenformer.data.inspection import Inspection, inspect_dataset
from megatron_tokenformer.data.sidecar import read_sidecar
from megatron_tokenformer.data.tokenizers import Tokenizer, add_tokenizer_arguments, load_tokenizer
from megatron_tokenformer.errors import UserError, run_cli

EXAMPLE = """example:
  python tools/inspect_dataset.py data/pile_text_document --documents 5

  Datasets of Megatron-LM and GPT-NeoX, which have no .json, can be inspected too; tell what made them:
  python tools/inspect_dataset.py other/pile_text_document --tokenizer-type HFTokenizer \\
      --tokenizer-model 20B_tokenizer.json

exit codes: 0 sound, 1 damaged (each kind of damage with file and position), 2 wrong usage or no such dataset
"""
_BAR = 40
_SHOWN_TOKENS, _SHOWN_IDS = 200, 16


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(__doc__, EXAMPLE)
    add = parser.add_argument
    add("prefix", metavar="PREFIX", help="the pair's name, without .bin")
    add("--documents", type=int, default=3, metavar="N", help="show the first N documents (default: 3)")
    add_tokenizer_arguments(parser, required=False)
    add("--vocab-size", type=int, metavar="N", help="ids must be below N (default: what the tokenizer has)")
    add("--no-verify", action="store_true", help="do not read the tokens, only the index and the sizes")
    add("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()
    if (args.tokenizer_model or args.merge_file or args.tiktoken_pattern) and not args.tokenizer_type:
        parser.error("--tokenizer-model, --merge-file and --tiktoken-pattern need --tokenizer-type")
    if args.documents < 0 or (args.vocab_size is not None and args.vocab_size < 1):
        parser.error("--documents must be at least 0, --vocab-size at least 1")
    return args


def main() -> int:
    """Inspect, print, and say by the exit code whether the dataset is sound."""
    args = parse_arguments()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Texts hold what not every terminal's encoding has.
        sys.stdout.reconfigure(errors="backslashreplace")
    tokenizer = None
    if args.tokenizer_type:
        tokenizer = load_tokenizer(
            args.tokenizer_type, args.tokenizer_model, merges=args.merge_file, pattern=args.tiktoken_pattern
        )
        refuse_other_tokenizer(args.prefix, tokenizer)
    vocab_size = args.vocab_size or (tokenizer.vocab_size if tokenizer else None)
    found = inspect_dataset(args.prefix, vocab_size=vocab_size, read_tokens=not args.no_verify)
    documents: list[dict[str, Any]] = []
    # Of a damaged pair nobody knows where the documents are.
    if not found.damages:
        documents = first_documents(args.prefix, args.documents, tokenizer or find_tokenizer(found))
    print_report(found, documents, verified=not args.no_verify)
    if args.json:
        print(json.dumps(as_json(found, documents, verified=not args.no_verify)))
    if found.damages:
        kinds = f"{len(found.damages)} kinds of damage, the first: " if len(found.damages) > 1 else ""
        raise UserError(f"{args.prefix} is damaged: {kinds}{found.damages[0]}", exit_code=1)
    return 0


def refuse_other_tokenizer(prefix: str, tokenizer: Tokenizer) -> None:
    """Raise UserError if the description names another tokenizer than the one asked for."""
    try:
        sidecar = read_sidecar(prefix)
    except UserError:
        return  # The inspection will tell.
    if sidecar is not None and sidecar["tokenizer"]["fingerprint"] != tokenizer.fingerprint:
        made_with = sidecar["tokenizer"].get("model") or sidecar["tokenizer"]["type"]
        raise UserError(f"{prefix} was made with another tokenizer ({made_with}, see {prefix}.json)")


def find_tokenizer(found: Inspection) -> Tokenizer | None:
    """The tokenizer that the description names, if it is still there and still the same; else say why not."""
    if found.sidecar is None:
        print("note: no .json names a tokenizer; give --tokenizer-type to decode")
        return None
    named = found.sidecar["tokenizer"]
    model = named.get("model")
    if model and not os.path.isfile(model):
        print(f"note: the tokenizer {model} is not here; to decode, give --tokenizer-type, --tokenizer-model")
        return None
    try:
        tokenizer = load_tokenizer(
            named["type"], model, merges=named.get("merges"), pattern=named.get("pattern")
        )
    except UserError as error:
        print(f"note: documents are not decoded: {error}")
        return None
    if tokenizer.fingerprint != named["fingerprint"]:
        print(f"note: {model} is no longer the tokenizer that made the data, so it does not decode them")
        return None
    return tokenizer


def first_documents(prefix: str, count: int, tokenizer: Tokenizer | None) -> list[dict[str, Any]]:
    """The beginnings of the first documents: the tokens in each, and text or, without a tokenizer, ids."""
    file = TokenFile(prefix)
    shown, start = [], 0
    for length in file.first_document_lengths(count).tolist():
        ids = file.window(start, min(length, _SHOWN_TOKENS))
        document: dict[str, Any] = {"tokens": length}
        if tokenizer is None or (ids.size and int(ids.max()) >= tokenizer.vocab_size):
            document["ids"] = ids[:_SHOWN_IDS].tolist()
        else:
            document["text"] = tokenizer.decode(ids.tolist())
        shown.append(document)
        start += length
    return shown


def print_report(found: Inspection, documents: list[dict[str, Any]], verified: bool) -> None:
    """The whole report in text."""
    print(found.prefix)
    if found.index is not None:
        print(
            f"  documents {found.index.documents:,}, sequences {found.index.sequences:,}, "
            f"tokens {found.tokens:,} ({found.index.dtype}), bytes {found.bytes:,}"
        )
    if found.vocab_size is not None:
        print(f"  vocabulary {found.vocab_size:,}", end="")
        print(f", largest id {found.largest_id:,}" if found.largest_id is not None else "")
    bins = found.lengths.histogram()
    if bins:
        summary = found.lengths.summary()
        print(
            f"  document length in tokens: mean {summary['mean']:,.1f}, median {summary['median']:,.1f}, "
            f"max {summary['max']:,}"
        )
        print_histogram(bins)
    for number, document in enumerate(documents):
        print(f"document {number}, {document['tokens']:,} tokens: {describe(document)}")
    for damage in found.damages:
        print(f"DAMAGED: {damage}")
    if not found.damages:
        checked = "sizes, pointers, boundaries, lengths, counts" + (" and ids" if verified else "")
        print(f"sound: {checked} agree" + ("" if verified else " (ids were not read)"))


def print_histogram(bins: list[tuple[int, int, int]]) -> None:
    """One line for each power of two, the longest bar being full."""
    most, total = max(count for _, _, count in bins), sum(count for _, _, count in bins)
    for low, high, count in bins:
        # A document is never invisible.
        bar = "#" * int(np.ceil(_BAR * count / most))
        print(f"  {f'{low:,} - {high:,}':>27} {count:>13,} {100 * count / total:5.1f} % {bar}")


def describe(document: dict[str, Any]) -> str:
    """A document on one line, without line ends and characters that would command the terminal."""
    shown = _SHOWN_TOKENS if "text" in document else _SHOWN_IDS
    if "text" in document:
        text = json.dumps(document["text"], ensure_ascii=False)
        # JSON escapes the control characters below 32 only.
        told = re.sub("[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", text)
    else:
        told = "ids " + " ".join(map(str, document["ids"]))
    return told + (" ..." if document["tokens"] > shown else "")


def as_json(found: Inspection, documents: list[dict[str, Any]], verified: bool) -> dict[str, Any]:
    """The report as one object."""
    index = found.index
    return {
        "prefix": found.prefix,
        "documents": index.documents if index else None,
        "sequences": index.sequences if index else None,
        "tokens": found.tokens,
        "bytes": found.bytes,
        "dtype": str(index.dtype) if index else None,
        "length": found.lengths.summary(),
        "histogram": [
            {"from": low, "to": high, "documents": count} for low, high, count in found.lengths.histogram()
        ],
        "vocab_size": found.vocab_size,
        "largest_id": found.largest_id,
        "ids_verified": verified,
        "first_documents": documents,
        "damages": [asdict(damage) for damage in found.damages],
    }


if __name__ == "__main__":
    run_cli(main)
