"""Measure tools/preprocess_data.py against its bare tokenizer backend and Hugging Face's tokenizers."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import orjson
import zstandard
from reporting import add_json_option, report

from megatron_tokenformer.data.tokenizer_training import train_tokenizer
from megatron_tokenformer.errors import UserError, run_cli

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = """example:
  python benchmarks/preprocess.py --megabytes 60 --workers 2

  Contenders run in turn, each in a fresh process. The tool reads .jsonl.zst and writes .bin and .idx,
  start-up and all; the bare backends find the texts in memory and their tokenizer loaded, use all cores, and
  keep nothing. Corpora: "code" is the Python source of this interpreter and its packages, whose
  words come again and again, so that caches make a backend its fastest; "words" is made-up words after Zipf's
  law, new ones to the last, as in natural text.
"""
CONTENDERS = {
    "tool": "the tool",
    "rest": "the tool, start-up taken off",
    "fastokens": "bare fastokens",
    "huggingface": "bare HF tokenizers",
}
_BATCH_CHARACTERS = 4_000_000


def make_code(size: int) -> Iterator[str]:
    """About `size` bytes of Python source in a shuffled order; over again if there is no more."""
    roots = [Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib")]
    files = sorted({path for root in roots for path in root.rglob("*.py") if path.stat().st_size < 1_000_000})
    random.Random(0).shuffle(files)
    while size > 0:
        before = size
        for path in files:
            text = path.read_text(encoding="utf-8", errors="ignore")
            yield text
            size -= len(text)
            if size <= 0:
                return
        if size == before:
            raise UserError("this Python has no sources to make a corpus of")


def make_words(size: int) -> Iterator[str]:
    """About `size` bytes of made-up words: of two million, the r-th as frequent as `1 / (r + 2.7)`."""
    generator = np.random.default_rng(0)
    syllables = [a + b + c for a in "bcdfghklmnprstvw" for b in "aeiou" for c in ("", "n", "r", "s", "l")]
    cuts = np.cumsum(1 / (np.arange(2_000_000) + 2.7))
    parts = generator.integers(len(syllables), size=(cuts.size, 5))
    lengths = 1 + np.minimum(4, np.log10(1 + np.arange(cuts.size)) * generator.uniform(0.3, 1, cuts.size))
    words = ["".join(syllables[i] for i in row[:n]) for row, n in zip(parts, lengths.astype(int))]
    while size > 0:
        ranks = np.searchsorted(cuts, generator.uniform(0, cuts[-1], generator.integers(50, 1_500)))
        text = " ".join(words[rank] + ("," if rank % 11 == 0 else "") for rank in ranks) + ".\n"
        yield text
        size -= len(text)


CORPORA = {"code": make_code, "words": make_words}


def make_inputs(folder: Path, corpus: str, megabytes: float, vocab_size: int) -> None:
    """Write `all.jsonl.zst`, `one.jsonl` (one document), and `tokenizer.json`, trained on 20 MB."""
    lines = [orjson.dumps({"text": text}) + b"\n" for text in CORPORA[corpus](int(megabytes * 1e6))]
    (folder / "all.jsonl.zst").write_bytes(zstandard.compress(b"".join(lines), 3))
    (folder / "one.jsonl").write_bytes(orjson.dumps({"text": "one"}) + b"\n")
    few = max(1, int(len(lines) * min(1, 20 / megabytes)))
    (folder / "some.jsonl").write_bytes(b"".join(lines[:few]))
    inputs = [str(folder / "some.jsonl")]
    train_tokenizer(inputs, "HFTokenizer", vocab_size, str(folder / "tokenizer.json"))


def run_bare(name: str, folder: Path, megabytes: float) -> dict[str, float]:
    """Encode the first `megabytes` in memory, with one bare library on all cores.

    Returns:
        Tokens, bytes of text, and the seconds that encoding took.
    """
    with zstandard.open(folder / "all.jsonl.zst", "rb") as file:
        lines = file.read().splitlines()
    batches: list[list[str]] = [[]]
    size = filled = 0
    for text in (orjson.loads(line)["text"] for line in lines):
        if filled > _BATCH_CHARACTERS:
            batches.append([])
            filled = 0
        batches[-1].append(text)
        filled += len(text)
        size += len(text.encode("utf-8"))
        if size > megabytes * 1e6:
            break
    model = str(folder / "tokenizer.json")
    tokens = 0
    if name == "fastokens":
        import fastokens

        fast = fastokens.Tokenizer.from_file(model)
        start = time.perf_counter()
        for batch in batches:
            tokens += len(fast.encode_batch_flat(batch, add_special_tokens=True)[0]) // 4
    else:
        import tokenizers

        slow = tokenizers.Tokenizer.from_file(model)
        start = time.perf_counter()
        for batch in batches:
            tokens += sum(len(encoding) for encoding in slow.encode_batch_fast(batch))
    return {"tokens": tokens, "bytes": size, "seconds": time.perf_counter() - start}


def run_tool(folder: Path, input_name: str, workers: int) -> dict[str, float]:
    """Run the tool on one of the inputs; tokens, bytes of text, and the seconds from its start to its end."""
    command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", str(folder / input_name)]
    command += ["--output-prefix", str(folder / "out"), "--overwrite", "--workers", str(workers)]
    command += ["--tokenizer-type", "HFTokenizer", "--tokenizer-model", str(folder / "tokenizer.json")]
    command += ["--tokenizer-backend", "fastokens", "--append-eod"]
    start = time.perf_counter()
    _run(command)
    seconds = time.perf_counter() - start
    summary = json.loads((folder / "out_text_document.json").read_text(encoding="utf-8"))
    # Ends of documents are the tool's own work, and no tokens of the backend's.
    tokens = summary["tokens"] - summary["documents"]
    return {"tokens": tokens, "bytes": summary["text_bytes"], "seconds": seconds}


def _run(command: list[str]) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise UserError(f"{command[1]} failed: {done.stderr.strip()[-500:]}", exit_code=1)
    return done.stdout


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All rounds: the median of each contender's tokens per second and of its ratios to the bare ones."""
    rates: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for number in range(args.rounds):
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
        start_up = run_tool(folder, "one.jsonl", args.workers)["seconds"]
        tool = run_tool(folder, "all.jsonl.zst", args.workers)
        rates["tool"].append(tool["tokens"] / tool["seconds"])
        rates["rest"].append(tool["tokens"] / (tool["seconds"] - start_up))
        for name, size in (("fastokens", 1e9), ("huggingface", args.huggingface_megabytes)):
            command = [sys.executable, __file__, "--bare", name, str(folder), str(size)]
            bare = json.loads(_run(command))
            rates[name].append(bare["tokens"] / bare["seconds"])
            if name == "fastokens" and bare["tokens"] != tool["tokens"]:
                raise UserError(f"{tool['tokens']} tokens of the tool, {bare['tokens']} bare", exit_code=1)
    return {
        "corpus": args.corpus,
        "workers": args.workers,
        "rounds": args.rounds,
        "text_bytes": tool["bytes"],
        "tokens": tool["tokens"],
        "vocab_size": args.vocab_size,
        "start_up_seconds": round(start_up, 3),
        "cores": len(os.sched_getaffinity(0)),
        "tokens_per_second": {
            name: {"median": median(values), "lowest": min(values), "highest": max(values)}
            for name, values in rates.items()
        },
        # Of each round, for what disturbs a machine disturbs a whole round.
        "ratio_to": {
            bare: {name: median(a / b for a, b in zip(values, rates[bare])) for name, values in rates.items()}
            for bare in ("fastokens", "huggingface")
        },
    }


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    rates = result["tokens_per_second"]
    rows = [
        f"{result['corpus']}: {result['text_bytes'] / 1e6:.0f} MB of text, {result['tokens']:,} tokens, "
        f"vocabulary {result['vocab_size']:,}, {result['workers']} workers, {result['cores']} cores, "
        f"median of {result['rounds']} rounds (lowest to highest)",
        "",
        "| | million tokens/s | of bare fastokens | of bare HF tokenizers |",
        "|---|---|---|---|",
    ]
    for name, title in CONTENDERS.items():
        own = rates[name]
        spread = f"{own['median'] / 1e6:.2f} ({own['lowest'] / 1e6:.2f} to {own['highest'] / 1e6:.2f})"
        of_fast, of_slow = (result["ratio_to"][bare][name] for bare in ("fastokens", "huggingface"))
        rows.append(f"| {title} | {spread} | {100 * of_fast:.0f} % | {of_slow:.1f} times |")
    return "\n".join(rows)


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["--bare"]:
        print(json.dumps(run_bare(sys.argv[2], Path(sys.argv[3]), float(sys.argv[4]))))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--corpus", choices=CORPORA, default="code")
    add("--megabytes", type=float, default=60, metavar="MB", help="of text (default: 60)")
    add(
        "--huggingface-megabytes",
        type=float,
        default=8,
        metavar="MB",
        help="its share (default: the first 8)",
    )
    add("--vocab-size", type=int, default=32_000, metavar="N")
    add(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="of the tool (default: all cores)",
    )
    add("--rounds", type=int, default=3, metavar="N", help="of every contender in turn (default: 3)")
    add_json_option(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder), args.corpus, args.megabytes, args.vocab_size)
        result = measure(args, Path(folder))
    report(table(result), result, args.json)


if __name__ == "__main__":
    run_cli(main)
