"""Tokenize JSON-lines text into Megatron's .bin/.idx token files."""

from __future__ import annotations

import argparse
import os
import time

from megatron_tokenformer.data.fast_tokenizer import BACKENDS
from megatron_tokenformer.data.preprocess import Job, preprocess
from megatron_tokenformer.data.readers import add_input_arguments
from megatron_tokenformer.data.tokenizers import add_tokenizer_arguments
from megatron_tokenformer.errors import run_cli

EXAMPLE = """example:
  python tools/preprocess_data.py --input 'pile/*.jsonl.zst' --output-prefix data/pile \\
      --tokenizer-type HFTokenizer --tokenizer-model 20B_tokenizer.json --append-eod --workers 32

  writes data/pile_text_document.bin and .idx, readable by Megatron-LM and GPT-NeoX too, and a .json with
  counts of documents and tokens. Train on it with data.train=data/pile_text_document.
"""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_input_arguments(parser)
    add = parser.add_argument
    add(
        "--output-prefix",
        required=True,
        metavar="PREFIX",
        help="outputs are PREFIX_text_document.bin, .idx, .json",
    )
    add_tokenizer_arguments(parser, required=True)
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
    add(
        "--append-eod",
        action="store_true",
        help="end each document with the end-of-document token (recommended)",
    )
    add(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="cores to use (default: all)",
    )
    add("--overwrite", action="store_true", help="replace existing outputs once the new ones are complete")
    add(
        "--log-interval",
        type=float,
        default=1.0,
        metavar="SECONDS",
        help="between progress updates (default: 1)",
    )
    return parser.parse_args()


def main() -> None:
    """Preprocess, and say what was made."""
    args = parse_arguments()
    job = Job(
        args.tokenizer_type,
        args.tokenizer_model,
        args.json_key,
        args.append_eod,
        args.tokenizer_backend,
        merge_file=args.merge_file,
        tiktoken_pattern=args.tiktoken_pattern,
        special_as_text=args.special_tokens_as_text,
    )
    start = time.monotonic()
    summary = preprocess(
        args.input,
        args.output_prefix,
        job,
        workers=args.workers,
        overwrite=args.overwrite,
        log_interval=args.log_interval,
    )
    print(
        f"{summary['prefix']}: {summary['documents']:,} documents, {summary['tokens']:,} tokens, "
        f"{summary['text_bytes']:,} bytes of text, {summary['empty_texts']:,} empty texts left out, "
        f"{time.monotonic() - start:.1f} s"
    )
    if summary["eod_inside_text"]:
        print(f"note: {summary['eod_inside_text']:,} end-of-document tokens were spelled out inside texts")


if __name__ == "__main__":
    run_cli(main)
