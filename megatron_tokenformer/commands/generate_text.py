"""Let a checkpoint write: after a prompt, after each line of standard input, or after a file's prompts.

Texts after --prompt and standard input appear as they come; those after a file's prompts are written in
batches, as JSON lines.  The checkpoint may be of any layout; its config, or its data, names its tokenizer.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from megatron_tokenformer.commands.command_line import CommandParser
from megatron_tokenformer.commands.options import LOAD, add_model_arguments, check_output
from megatron_tokenformer.config.schema import resolve_precision
from megatron_tokenformer.errors import UserError, run_cli

if TYPE_CHECKING:
    from megatron_tokenformer.data.tokenizers import Tokenizer
    from megatron_tokenformer.evaluation.generation import Prompt, PromptEncoder, Written
    from megatron_tokenformer.evaluation.load import Stored
    from megatron_tokenformer.evaluation.sampling import Sampling
    from megatron_tokenformer.model.language_model import LanguageModel

EPILOG = """\
With equal --seed a prompt's text is the same again, whatever batch it is in, as far as the device computes
the same; its samples differ.  The end of a document, or a --stop text, ends a text before --max-tokens.

examples:
  python tools/generate_text.py --load runs/tokenformer-124m --prompt 'The Pile is'
  python tools/generate_text.py --load runs/tokenformer-124m --prompt 'def ' --temperature 0.8 --top-p 0.95 \\
      --num-samples 3 --max-tokens 200 --stop $'\\n\\n'

  # a prompt in each line; or type them
  python tools/generate_text.py --load runs/tokenformer-124m < prompts.txt

  # many, in batches: a text in each line, or JSON lines ({"prompt": ...}) where the name ends in .jsonl
  python tools/generate_text.py --load runs/tokenformer-124m --prompt-file prompts.jsonl \\
      --output texts.jsonl --batch-size 64
"""


WRITTEN = {"sample", "text", "tokens", "finish"}
"""what is written of each text beside its prompt"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(__doc__, EPILOG)
    add = parser.add_argument
    add("--load", required=True, help=LOAD)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="what to go on from (default: each line of standard input)")
    source.add_argument("--prompt-file", type=Path, metavar="FILE", help="prompts, one in each line")
    add("--output", type=Path, metavar="FILE", help="with --prompt-file: where the JSON lines go")
    add("--batch-size", type=int, default=16, metavar="N", help="texts at once, of a file (default: 16)")
    add("--num-samples", type=int, default=1, metavar="N", help="texts for each prompt (default: 1)")
    add("--max-tokens", type=int, default=128, metavar="N", help="of each text (default: 128)")
    add("--temperature", type=float, help="0: the likeliest token (default; 1 with --top-k, -p or samples)")
    add("--top-k", type=int, default=0, metavar="K", help="only the K likeliest tokens (default: all)")
    add("--top-p", type=float, default=1.0, metavar="P", help="only the likeliest that have P together")
    add("--repetition-penalty", type=float, default=1.0, metavar="X", help="of tokens already there")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends a text; may be given again")
    add("--seed", type=int, default=1234, help="of what is sampled (default: 1234)")
    add("--tokenizer-model", metavar="FILE", help="the tokenizer's file (default: where the checkpoint says)")
    add_model_arguments(parser)
    add("--json", action="store_true", help="print one JSON object as the last line")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Open the checkpoint, and write."""
    given = parse(argv)
    check(given)
    # torch takes a second, so --help does without.
    from megatron_tokenformer.evaluation import load

    sampling = sampling_of(given)
    prompts = list(read_prompts(given.prompt_file)) if given.prompt_file else []
    stored = load.open_checkpoint(given.load, given.verify)
    tokenizer, device = load.checkpoint_tokenizer(stored, given.tokenizer_model), load.one_device()
    precision = resolve_precision(given.precision, device.type)
    model = load.load_model(stored.path, stored.manifest, precision, device)
    writer = Writer(given, stored, model, tokenizer, sampling)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A model may write what not every terminal's encoding has.
        sys.stdout.reconfigure(errors="backslashreplace")
    if given.prompt_file:
        told = writer.write_file(prompts)
    else:
        told = writer.write_to_terminal([given.prompt] if given.prompt is not None else typed_prompts())
    if given.json:
        print(json.dumps({"checkpoint": str(stored.path), "step": stored.manifest.step, **told}))
    return 0


def check(given: argparse.Namespace) -> None:
    """Refuse what cannot be meant.

    Raises:
        UserError: names the option.
    """
    for name in ("batch_size", "num_samples", "max_tokens"):
        if getattr(given, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(given, name)} must be at least 1")
    if given.prompt is not None:
        check_text(given.prompt, "--prompt")
    if given.seed < 0:
        raise UserError(f"--seed {given.seed} must be at least 0")
    if "" in given.stop:
        raise UserError("--stop '' would end every text at once")
    if given.output and not given.prompt_file:
        raise UserError("--output is for --prompt-file; what a prompt gives is printed")
    if given.output:
        check_output(given.output)


def sampling_of(given: argparse.Namespace) -> Sampling:
    """What the options ask for.

    Raises:
        UserError: several samples of what is always the same, or a value that means nothing.
    """
    from megatron_tokenformer.evaluation.sampling import Sampling

    asked = given.top_k != 0 or given.top_p != 1.0 or given.num_samples > 1
    temperature = given.temperature if given.temperature is not None else float(asked)
    if temperature == 0.0 and asked:
        raise UserError(
            "--temperature 0 takes the likeliest token: leave out --num-samples, --top-k and --top-p"
        )
    return Sampling(temperature, given.top_k, given.top_p, given.repetition_penalty)


def read_prompts(path: Path) -> Iterator[dict[str, Any]]:
    """The prompts of a file, with what else its JSON lines hold.

    Raises:
        UserError: a line that is not text or, of JSON, no row with a prompt; or no prompt at all.
    """
    empty = True
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        for line, where in lines_of(file, str(path)):
            empty = False
            yield {"prompt": line} if path.suffix != ".jsonl" else read_row(line, where)
    if empty:
        raise UserError(f"{path} holds no prompt", exit_code=1)


def read_row(line: str, where: str) -> dict[str, Any]:
    """A prompt as a JSON line, and what else that holds.

    Raises:
        UserError: it is no object with a text in `prompt`, or holds what is to be written.
    """
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: {error}", exit_code=1) from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise UserError(f'{where}: no object with a text in "prompt"', exit_code=1)
    taken = sorted(WRITTEN & row.keys())
    if taken:
        told = f'"{taken[0]}" is what is written here, and would be lost; give it another name'
        raise UserError(f"{where}: {told}", exit_code=1)
    check_text(row["prompt"], where)
    return row


def typed_prompts() -> Iterator[str]:
    """The lines of standard input, each as soon as it is there."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    return (line for line, _ in lines_of(sys.stdin, "standard input"))


def lines_of(file: TextIO, name: str) -> Iterator[tuple[str, str]]:
    """Lines without their ends, and where each is, as soon as it is there.

    The file is one that makes surrogates of what is not text, for else a whole buffer fails, and no line.

    Raises:
        UserError: a line is not text.
    """
    for number, line in enumerate(file, 1):
        where = f"{name}, line {number}"
        check_text(line, where)
        yield line.rstrip("\n"), where


def check_text(text: str, where: str) -> None:
    """Refuse what no tokenizer takes.

    Raises:
        UserError: the text holds bytes that are no UTF-8, or half a character.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        byte = 0xDC80 <= code <= 0xDCFF  # as surrogateescape makes them
        bad = f"byte 0x{code - 0xDC00:02x}" if byte else f"half a character, \\u{code:04x}"
        told = f"{where} is not UTF-8 text: character {error.start + 1} is {bad}"
        raise UserError(told, exit_code=1) from None


@dataclass
class Writer:
    """The model, and how it is to write."""

    given: argparse.Namespace
    stored: Stored
    model: LanguageModel
    tokenizer: Tokenizer
    sampling: Sampling

    def __post_init__(self) -> None:
        from megatron_tokenformer.evaluation.generation import PromptEncoder

        self._encode: PromptEncoder = PromptEncoder(self.tokenizer)
        self._warned = False

    def write_to_terminal(self, prompts: Iterable[str]) -> dict[str, Any]:
        """Print each prompt and its texts as they come; what was written."""
        rows = []
        for number, text in enumerate(prompts):
            for sample in range(self.given.num_samples):
                print(text, end="", flush=True)
                prompt = self._prompt(text, number, sample)
                (written,) = self._generate([prompt], stream=True)
                print(flush=True)
                rows.append(as_row({"prompt": text}, sample, written))
        return {"texts": rows}

    def write_file(self, prompts: list[dict[str, Any]]) -> dict[str, Any]:
        """Write the texts of all prompts, in order and in batches; how many, and how fast."""
        from tqdm import tqdm

        given, began, tokens = self.given, time.perf_counter(), 0
        work = (
            (row, number, sample) for number, row in enumerate(prompts) for sample in range(given.num_samples)
        )
        total = len(prompts) * given.num_samples
        place = open(given.output, "x", encoding="utf-8") if given.output else nullcontext(sys.stdout)
        with place as file, tqdm(total=total, unit="text", desc="generate", disable=None) as bar:
            while batch := list(islice(work, given.batch_size)):
                texts = self._generate([self._prompt(row["prompt"], *which) for row, *which in batch])
                for (row, _, sample), written in zip(batch, texts):
                    tokens += len(written.ids)
                    print(json.dumps(as_row(row, sample, written), ensure_ascii=False), file=file, flush=True)
                bar.update(len(batch))
        seconds = time.perf_counter() - began
        rate = {"seconds": seconds, "tokens_per_s": tokens / seconds}
        return {"prompts": len(prompts), "texts": total, "tokens": tokens, **rate}

    def _prompt(self, text: str, number: int, sample: int) -> Prompt:
        from megatron_tokenformer.evaluation.generation import Prompt

        ids, trained = self._encode(text), self.stored.config.data.sequence_length
        if len(ids) + self.given.max_tokens > trained and not self._warned:
            self._warned = True
            print(
                f"warning: {len(ids)} tokens of a prompt and up to {self.given.max_tokens} after it are more "
                f"than the {trained} that the model was trained on; what lies beyond may be of little use",
                file=sys.stderr,
            )
        return Prompt(ids, (self.given.seed, number, sample))

    def _generate(self, prompts: list[Prompt], stream: bool = False) -> list[Written]:
        import torch

        from megatron_tokenformer.evaluation.generation import generate

        def show(row: int, text: str) -> None:
            if stream:
                print(text, end="", flush=True)

        how = self.sampling, self.given.max_tokens, self.given.stop
        try:
            return generate(self.model, self.tokenizer, prompts, *how, show)
        except torch.OutOfMemoryError:
            longest = max(len(prompt.ids) for prompt in prompts) + self.given.max_tokens
            raise UserError(
                f"{len(prompts)} texts of up to {longest} tokens do not fit into the device's memory; "
                "give a smaller --batch-size or --max-tokens",
                exit_code=1,
            ) from None


def as_row(row: dict[str, Any], sample: int, written: Written) -> dict[str, Any]:
    """A text as JSON, with what came with its prompt."""
    return {
        **row,
        "sample": sample,
        "text": written.text,
        "tokens": len(written.ids),
        "finish": written.finish,
    }


if __name__ == "__main__":
    run_cli(main)
