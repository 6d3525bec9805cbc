"""Join datasets (.bin/.idx pairs) into one, byte for byte what one preprocessing pass would have written."""

from __future__ import annotations

import time

from megatron_tokenformer.commands.command_line import CommandParser
from megatron_tokenformer.data.merging import merge_datasets
from megatron_tokenformer.errors import run_cli

EXAMPLE = """example:
  python tools/merge_datasets.py --input data/pile-0_text_document data/pile-1_text_document \\
      --output-prefix data/pile_text_document

  The order of --input is the order of the documents. Parts must have the same token type and tokenizer
  (PREFIX.json tells). The inputs stay as they are; the output needs as much space as they take. To train on
  several datasets in chosen proportions, do not merge them: give data.train a list of [weight, prefix].
"""


def main() -> None:
    """Merge, and say what was made."""
    parser = CommandParser(__doc__, EXAMPLE)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PREFIX", help="pairs to join, without .bin, in order")
    add("--output-prefix", required=True, metavar="PREFIX", help="outputs are PREFIX.bin, .idx, .json")
    add("--overwrite", action="store_true", help="replace an existing output once the new one is complete")
    args = parser.parse_args()
    start = time.monotonic()
    merged = merge_datasets(args.input, args.output_prefix, overwrite=args.overwrite)
    print(
        f"{merged.prefix}: {merged.documents:,} documents, {merged.tokens:,} tokens from {len(args.input)} "
        f"part(s), {time.monotonic() - start:.1f} s"
    )
    if not merged.described:
        print("note: the parts have no .json, so their tokenizers were not compared and none was written")


if __name__ == "__main__":
    run_cli(main)
