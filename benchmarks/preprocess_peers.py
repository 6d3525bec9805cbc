"""Measure tools/preprocess_data.py against the preprocessing tools of Megatron-LM and GPT-NeoX."""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import zstandard
from preprocess import CORPORA, ROOT, make_inputs
from reporting import add_json_option, report

from megatron_tokenformer.data.tokenizer_training import END_OF_TEXT
from megatron_tokenformer.errors import UserError, run_cli

EXAMPLE = """example:
  PYTHONPATH=/opt/peer-libraries python benchmarks/preprocess_peers.py --corpus words --megabytes 150 \\
      --megatron-lm ~/Megatron-LM --gpt-neox ~/gpt-neox

  All read the same .jsonl with the same tokenizer.json, --append-eod and number of workers, in turn, each in
  a fresh process from its start to its end.  CPU time is that of all processes of a tool; memory is the
  highest sum of their proportional set sizes (what they share counts once), looked at as often as 1 % of a
  core allows.  The peers run with this Python; libraries that only they need can be on PYTHONPATH.
"""
OURS = "ours"
TITLES = {OURS: "ours", "gpt-neox": "GPT-NeoX", "megatron-lm": "Megatron-LM"}
TOOLS = {"gpt-neox": "tools/datasets/preprocess_data.py", "megatron-lm": "tools/preprocess_data.py"}
_LEAST_PAUSE = 0.1  # seconds between two looks at the memory


class Usage(NamedTuple):
    """What one run of a tool took: seconds, seconds, bytes."""

    cpu_seconds: float
    wall_seconds: float
    peak_bytes: int


class Contender(NamedTuple):
    """A tool to run: its name, its command but for input and output, and its `PYTHONPATH`."""

    name: str
    command: list[str]
    python_path: str


def find_contenders(checkouts: dict[str, str | None], folder: Path, workers: int) -> list[Contender]:
    """Ours, and the tool of every checkout that is given.

    Args:
        checkouts: the folder of `gpt-neox` and `megatron-lm`; None for one to leave out.
        folder: where `tokenizer.json` and Megatron-LM's folders are, see `prepare`.
        workers: of each tool.

    Raises:
        UserError: no checkout given, or one without its tool.
    """
    model = str(folder / "tokenizer.json")
    common = ["--append-eod", "--workers", str(workers)]
    ours = [sys.executable, str(ROOT / "tools/preprocess_data.py"), *common, "--overwrite"]
    ours += ["--tokenizer-type", "HFTokenizer", "--tokenizer-model", model]
    contenders = [Contender(OURS, ours, str(ROOT))]
    for name, checkout in checkouts.items():
        if checkout is None:
            continue
        tool = Path(checkout).resolve() / TOOLS[name]
        if not tool.is_file():
            raise UserError(f"--{name} {checkout}: no {TOOLS[name]} there; give the folder of a checkout")
        command = [sys.executable, str(tool), *common]
        if name == "gpt-neox":
            command += ["--tokenizer-type", "HFTokenizer", "--vocab-file", model]
        else:
            command += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder / "hf")]
            # Releases with this option end with a traceback, after all output, where it names no figures.
            if "--performance-dir" in tool.read_text(encoding="utf-8"):
                command += ["--performance-dir", str(folder / "performance")]
        path = os.pathsep.join(filter(None, [str(Path(checkout).resolve()), os.environ.get("PYTHONPATH")]))
        contenders.append(Contender(name, command, path))
    if len(contenders) == 1:
        raise UserError("nothing to compare with; give --megatron-lm DIR, --gpt-neox DIR or both")
    return contenders


def prepare(folder: Path, corpus: str, megabytes: float, vocab_size: int) -> None:
    """Write `all.jsonl`, `one.jsonl` (one document), `tokenizer.json`, and Megatron-LM's folders."""
    make_inputs(folder, corpus, megabytes, vocab_size)
    with zstandard.open(folder / "all.jsonl.zst", "rb") as packed:
        (folder / "all.jsonl").write_bytes(packed.read())
    (folder / "hf").mkdir()
    (folder / "hf/tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
    (folder / "hf/tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "performance").mkdir()
    (folder / "performance/1_workers.json").write_text('{"1": [1.0]}', encoding="utf-8")


def run(contender: Contender, folder: Path, input_name: str) -> Usage:
    """Run a tool on one of the inputs; its outputs get the prefix `folder / name`.

    Raises:
        UserError: it failed, or left no outputs.
    """
    for path in _outputs(contender.name, folder):
        path.unlink(missing_ok=True)
    prefix = str(folder / contender.name)
    command = [*contender.command, "--input", str(folder / input_name), "--output-prefix", prefix]
    usage = run_measured(command, {**os.environ, "PYTHONPATH": contender.python_path}, folder)
    for path in _outputs(contender.name, folder):
        if not path.is_file():
            raise UserError(f"{TITLES[contender.name]} ended well, but wrote no {path.name}", exit_code=1)
    return usage


def _outputs(name: str, folder: Path) -> list[Path]:
    return [folder / f"{name}_text_document.{kind}" for kind in ("bin", "idx")]


def run_measured(command: list[str], environment: dict[str, str], folder: Path) -> Usage:
    """Run a command in `folder`; what it and all processes that it awaits take.

    Raises:
        UserError: it ended with another code than 0.
    """
    with tempfile.TemporaryFile(dir=folder) as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, cwd=folder, start_new_session=True
        )
        ended = threading.Event()
        peaks = [0]

        def watch() -> None:
            pause = _LEAST_PAUSE
            while not ended.wait(pause):
                start = time.thread_time()
                peaks.append(tree_bytes(process.pid))
                # Looking takes time from the cores that are measured, and more for tools of more processes.
                pause = max(_LEAST_PAUSE, 100 * (time.thread_time() - start))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - start
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            ended.set()
            watcher.join()
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.returncode:
            output.seek(0)
            end = output.read().decode("utf-8", errors="replace").strip()[-500:]
            raise UserError(f"{command[1]} ended with {process.returncode}: {end}", exit_code=1)
    return Usage(usage.ru_utime + usage.ru_stime, seconds, max(peaks))


def tree_bytes(pid: int) -> int:
    """The sum of the proportional set sizes of a process and its descendants; 0 for one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        own = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return 0
    return own + sum(map(tree_bytes, children))


def measure(args: argparse.Namespace, contenders: list[Contender], folder: Path) -> dict[str, Any]:
    """All rounds of all contenders in turn, and one run each on one document for the start-up."""
    usages: dict[str, list[Usage]] = {contender.name: [] for contender in contenders}
    start_ups = {contender.name: run(contender, folder, "one.jsonl") for contender in contenders}
    loads = []
    for number in range(args.rounds):
        loads.append(os.getloadavg()[0])
        for contender in contenders:
            usages[contender.name].append(run(contender, folder, "all.jsonl"))
            print(f"round {number + 1} {contender.name}: {usages[contender.name][-1]}", file=sys.stderr)
    summary = json.loads((folder / f"{OURS}_text_document.json").read_text(encoding="utf-8"))
    return {
        "corpus": args.corpus,
        "workers": args.workers,
        "rounds": args.rounds,
        "documents": summary["documents"],
        "empty_texts": summary["empty_texts"],
        "text_bytes": summary["text_bytes"],
        "tokens": summary["tokens"],
        "vocab_size": summary["tokenizer"]["vocab_size"],
        "cores": len(os.sched_getaffinity(0)),
        "load_before_rounds": loads,
        "contenders": {
            name: compare(runs, usages[OURS], summary["tokens"])
            | {"start_up": start_ups[name]._asdict(), "identical": _identical(name, folder)}
            for name, runs in usages.items()
        },
    }


def _identical(name: str, folder: Path) -> list[bool]:
    pairs = zip(_outputs(OURS, folder), _outputs(name, folder))
    return [filecmp.cmp(ours, theirs, shallow=False) for ours, theirs in pairs]


def compare(runs: list[Usage], ours: list[Usage], tokens: int) -> dict[str, Any]:
    """A contender's figures over all rounds.

    Args:
        runs: its runs, one a round.
        ours: those of our tool, of the same rounds.
        tokens: that each run wrote.

    Returns:
        Medians, the extremes of both rates, and how many times faster ours is (median of the rounds' ratios,
        for what disturbs a machine disturbs a round).
    """
    per_cpu = [tokens / run.cpu_seconds for run in runs]
    per_wall = [tokens / run.wall_seconds for run in runs]
    return {
        "cpu_seconds": median(run.cpu_seconds for run in runs),
        "wall_seconds": median(run.wall_seconds for run in runs),
        "peak_bytes": max(run.peak_bytes for run in runs),
        "tokens_per_cpu_second": {"median": median(per_cpu), "lowest": min(per_cpu), "highest": max(per_cpu)},
        "tokens_per_second": {"median": median(per_wall), "lowest": min(per_wall), "highest": max(per_wall)},
        "ours_is_times": {
            "per_cpu_second": median(a.cpu_seconds / b.cpu_seconds for a, b in zip(runs, ours)),
            "per_second": median(a.wall_seconds / b.wall_seconds for a, b in zip(runs, ours)),
        },
    }


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    loads = result["load_before_rounds"]
    rows = [
        f"{result['corpus']}: {result['text_bytes'] / 1e6:.0f} MB of text, "
        f"{result['documents']:,} documents, {result['empty_texts']:,} empty texts, "
        f"{result['tokens']:,} tokens, "
        f"vocabulary {result['vocab_size']:,}, {result['workers']} workers, {result['cores']} cores, "
        f"load {min(loads):.1f} to {max(loads):.1f} before the rounds, "
        f"median of {result['rounds']} rounds (lowest to highest)",
        "",
        "| | million tokens per CPU-second | per second | start-up, CPU s / s | peak memory, MB "
        "| ours, per CPU-second | ours, per second | same .bin / .idx |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, figures in result["contenders"].items():
        rates = [figures[key] for key in ("tokens_per_cpu_second", "tokens_per_second")]
        spreads = [
            f"{rate['median'] / 1e6:.2f} ({rate['lowest'] / 1e6:.2f} to {rate['highest'] / 1e6:.2f})"
            for rate in rates
        ]
        start_up, times = figures["start_up"], figures["ours_is_times"]
        same = " / ".join("yes" if identical else "no" for identical in figures["identical"])
        rows.append(
            f"| {TITLES[name]} | {spreads[0]} | {spreads[1]} "
            f"| {start_up['cpu_seconds']:.1f} / {start_up['wall_seconds']:.1f} "
            f"| {figures['peak_bytes'] / 1e6:,.0f} | {times['per_cpu_second']:.1f} times "
            f"| {times['per_second']:.1f} times | {same} |"
        )
    return "\n".join(rows)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--megatron-lm", metavar="DIR", help="a checkout of Megatron-LM (default: left out)")
    add("--gpt-neox", metavar="DIR", help="a checkout of GPT-NeoX (default: left out)")
    add("--corpus", choices=CORPORA, default="words", help="see benchmarks/preprocess.py (default: words)")
    add("--megabytes", type=float, default=150, metavar="MB", help="of text (default: 150)")
    add("--vocab-size", type=int, default=50_000, metavar="N", help="(default: 50000)")
    add("--workers", type=int, default=2, metavar="N", help="of each tool (default: 2)")
    add("--rounds", type=int, default=3, metavar="N", help="of every tool in turn (default: 3)")
    add_json_option(parser)
    return parser.parse_args(arguments)


def main() -> None:
    """Measure and print."""
    args = parse_arguments()
    checkouts = {"gpt-neox": args.gpt_neox, "megatron-lm": args.megatron_lm}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        contenders = find_contenders(checkouts, folder, args.workers)
        prepare(folder, args.corpus, args.megabytes, args.vocab_size)
        result = measure(args, contenders, folder)
    report(table(result), result, args.json)


if __name__ == "__main__":
    run_cli(main)
