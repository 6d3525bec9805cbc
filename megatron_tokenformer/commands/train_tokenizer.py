"""Train a tokenizer on JSON-lines text: byte-level BPE (tokenizer.json) or sentencepiece (.model)."""

from __future__ import annotations

from megatron_tokenformer.commands.command_line import CommandParser
from megatron_tokenformer.data.inputs import add_input_arguments
from megatron_tokenformer.data.tokenizer_training import TRAINABLE_TYPES, train_tokenizer
from megatron_tokenformer.errors import run_cli

EXAMPLE = """example:
  python tools/train_tokenizer.py --input 'corpus/train-*.jsonl.zst' --type HFTokenizer --vocab-size 4096 \\
      --output corpus/tokenizer.json
"""


def main() -> None:
    """Parse the command line, train, and say how many ids there are."""
    parser = CommandParser(__doc__, EXAMPLE)
    add_input_arguments(parser)
    add = parser.add_argument
    add("--type", choices=TRAINABLE_TYPES, default="HFTokenizer")
    add("--vocab-size", type=int, required=True, metavar="N", help="ids wanted, special tokens included")
    add("--output", required=True, metavar="FILE", help="tokenizer.json or .model to write")
    add("--overwrite", action="store_true", help="replace an existing output")
    args = parser.parse_args()
    size = train_tokenizer(
        args.input,
        args.type,
        args.vocab_size,
        args.output,
        json_key=args.json_key,
        overwrite=args.overwrite,
    )
    fewer = "" if size == args.vocab_size else f" (the text gives no more; {args.vocab_size} were wanted)"
    print(f"{args.output}: {size} ids{fewer}")


if __name__ == "__main__":
    run_cli(main)
