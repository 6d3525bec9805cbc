"""Tokenize JSON-lines text into Megatron's .bin/.idx token files."""

from __future__ import annotations

import argparse
import os
import time

from megatron_tokenformer.commands.command_line import CommandParser
from megatron_tokenformer.data.encode import Job
from megatron_tokenformer.data.fast_tokenizer import BACKENDS
from megatron_tokenformer.data.inputs import add_input_arguments, parse_shard
from megatron_tokenformer.data.preprocess import ON_ERROR, Options, Result, preprocess
from megatron_tokenformer.data.tokenizers import add_tokenizer_arguments
from megatron_tokenformer.errors import run_cli

EXAMPLE = """examples:
  python tools/preprocess_data.py --input 'pile/*.jsonl.zst' --output-prefix data/pile \\
      --tokenizer-type HFTokenizer --tokenizer-model 20B_tokenizer.json --append-eod --workers 32

  writes data/pile_text_document.bin and .idx, readable by Megatron-LM and GPT-NeoX too, and a .json with
  counts of documents and tokens. Train on it with data.train=data/pile_text_document. If it is stopped, the
  same command goes on after the last finished input file.

  ... --split-by meta.pile_set_name  makes a dataset for each component: data/pile_wikipedia-en_text_document
  ... --shard 3/16 --output-prefix data/part-3  makes the fourth of 16 parts, for tools/merge_datasets.py
"""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(__doc__, EXAMPLE)
    add_input_arguments(parser)
    add = parser.add_argument
    add(
        "--output-prefix",
        required=True,
        metavar="PREFIX",
        help="outputs are PREFIX_text_document.bin, .idx, .json",
    )
    _add_encoding_arguments(parser)
    add(
        "--append-eod",
        action="store_true",
        help="end each document with the end-of-document token (recommended)",
    )
    add(
        "--split-by",
        metavar="KEY",
        help="write a dataset for each value of this key, such as meta.pile_set_name",
    )
    add(
        "--shard",
        metavar="I/N",
        help="read only part I (0 to N - 1) of the input files, cut into N parts of about equal bytes",
    )
    add(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="cores to use (default: all)",
    )
    add(
        "--on-error",
        choices=ON_ERROR,
        default="fail",
        help="bad lines and files: stop, or leave them out and count them (default: fail)",
    )
    add("--overwrite", action="store_true", help="replace existing outputs once the new ones are complete")
    add("--restart", action="store_true", help="begin anew where an unfinished run could be continued")
    add(
        "--log-interval",
        type=float,
        default=1.0,
        metavar="SECONDS",
        help="between progress updates (default: 1)",
    )
    return parser.parse_args()


def _add_encoding_arguments(parser: argparse.ArgumentParser) -> None:
    add_tokenizer_arguments(parser, required=True)
    add = parser.add_argument
    add(
        "--tokenizer-backend",
        choices=BACKENDS,
        default="auto",
        help="auto: fastokens if it takes the tokenizer and a check on the input finds its ids identical, "
        "else the tokenizer's own library (default: auto)",
    )
    add(
        "--special-tokens-as-text",
        action="store_true",
        help="encode special tokens spelled out in documents as ordinary text, so that no text can forge the "
        "end of a document (default: as Megatron-LM, they become their ids, and are counted)",
    )


def main() -> None:
    """Preprocess, and say what was made."""
    args = parse_arguments()
    job = Job(
        args.tokenizer_type,
        args.tokenizer_model,
        args.json_key,
        args.append_eod,
        args.tokenizer_backend,
        args.split_by,
        merge_file=args.merge_file,
        tiktoken_pattern=args.tiktoken_pattern,
        special_as_text=args.special_tokens_as_text,
    )
    options = Options(
        workers=args.workers,
        on_error=args.on_error,
        shard=parse_shard(args.shard) if args.shard is not None else None,
        overwrite=args.overwrite,
        restart=args.restart,
        log_interval=args.log_interval,
    )
    start = time.monotonic()
    report(preprocess(args.input, args.output_prefix, job, options), time.monotonic() - start)


def report(result: Result, seconds: float) -> None:
    """The summary: a line for each dataset, and what was left out."""
    if result.resumed:
        print(f"went on after {result.resumed} input files that were done before")
    for dataset in result.datasets:
        print(
            f"{dataset['prefix']}: {dataset['documents']:,} documents, {dataset['tokens']:,} tokens, "
            f"{dataset['text_bytes']:,} bytes of text, {dataset['empty_texts']:,} empty texts left out"
        )
    documents, tokens, inside = (
        sum(dataset[name] for dataset in result.datasets)
        for name in ("documents", "tokens", "eod_inside_text")
    )
    print(f"{documents:,} documents and {tokens:,} tokens in all, {seconds:.1f} s")
    if inside:
        print(f"note: {inside:,} end-of-document tokens were spelled out inside texts")
    for line in result.problems.lines():
        print(f"left out: {line}")


if __name__ == "__main__":
    run_cli(main)
