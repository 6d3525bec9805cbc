"""What a save costs training: asynchronous, synchronous, and none, in turns in one run.

A round is, for each of the three, a save and some steps after it.  Two figures count: for how long training
stopped at the save, and how much longer save and steps took than the steps without a save, which also holds
what the writing took from the steps of processor, memory and disk.  Both as a share of a step's time.

    python benchmarks/checkpoint.py --hidden-size 256 --layers 4 --rounds 5
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from reporting import add_json_option, report, settings

from megatron_tokenformer.config.load import validate
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.config.sizes import parameter_count
from megatron_tokenformer.data.indexed import TokenFileWriter
from megatron_tokenformer.parallel.environment import find_processes
from megatron_tokenformer.quiet import quiet_imports

with quiet_imports():
    from megatron_tokenformer.checkpoint.saving import Saver
    from megatron_tokenformer.parallel import layout
    from megatron_tokenformer.training.batches import Batch, pipeline_batches
    from megatron_tokenformer.training.loop import save, train_step
    from megatron_tokenformer.training.run import Run, open_run

VOCABULARY = 8192
MODES = ("none", "asynchronous", "synchronous")


def run_config(folder: Path, given: argparse.Namespace) -> RunConfig:
    """A run on random tokens that never comes to its last step."""
    prefix = str(folder / "benchmark_text_document")
    with TokenFileWriter(prefix, np.dtype("uint16")) as writer:
        tokens = np.random.default_rng(0).integers(0, VOCABULARY, 1_000_000, dtype=np.uint16)
        writer.add(tokens, np.full(1000, 1000))
        writer.finish()
    width = given.hidden_size
    tree = {
        "run_dir": str(folder / "run"),
        "model": {
            "layers": given.layers,
            "hidden_size": width,
            "attention_heads": max(width // 64, 1),
            "tokens": {"qkv": width, "output": width, "ffn": 4 * width},
            "vocab_size": VOCABULARY,
        },
        "data": {"train": prefix, "sequence_length": given.sequence_length},
        "training": {"steps": 10**6, "global_batch_size": given.batch, "micro_batch_size": given.batch},
        "checkpoint": {"keep_last": 1},
    }
    return validate(RunConfig, tree, "the benchmark")


def timed_round(run: Run, batches: Iterator[Batch], mode: str, steps: int) -> tuple[float, float, float]:
    """Seconds that training stopped, seconds until the steps were done, and seconds then left to wait."""
    began = time.perf_counter()
    if mode != "none":
        save(run)
    stopped = time.perf_counter() - began
    for _ in range(steps):
        train_step(run, batches).item()
    done = time.perf_counter() - began
    run.saver.wait()
    return stopped, done, time.perf_counter() - began - done


def measure(config: RunConfig, rounds: int, steps: int) -> dict[str, dict[str, float]]:
    """Medians over the rounds, in milliseconds and as shares of a step's time, for each mode."""
    here = layout.start(config.parallel, find_processes())
    times: dict[str, list[tuple[float, float, float]]] = {mode: [] for mode in MODES}
    with contextlib.redirect_stdout(io.StringIO()), open_run(config, here) as run:
        runs = {mode: replace(run, saver=_saver(run, mode)) for mode in MODES}
        batches = pipeline_batches(run.training_data, 0, config, here, run.accumulation, run.eod_id)
        for round_ in range(rounds + 1):
            for mode in MODES:
                taken = timed_round(runs[mode], batches, mode, steps)
                if round_:  # the first takes memory and warms up
                    times[mode].append(taken)
    layout.stop()
    without = statistics.median(done for _, done, _ in times["none"])
    found: dict[str, dict[str, float]] = {}
    for mode, rows in times.items():
        stopped, done, waited = (statistics.median(column) for column in zip(*rows))
        lost, step = done - without, without / steps
        found[mode] = {
            "stopped_ms": 1e3 * stopped,
            "stopped_of_a_step": stopped / step,
            "lost_ms": 1e3 * lost,
            "lost_of_a_step": lost / step,
            "still_writing_ms": 1e3 * waited,
        }
    found["none"]["step_ms"] = 1e3 * without / steps
    return found


def _saver(run: Run, mode: str) -> Saver:
    saving = run.config.checkpoint.model_copy(update={"asynchronous": mode == "asynchronous"})
    return Saver(run.folder, saving, run.layout, lambda _: None)


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        "| save | training stopped, ms | of a step | lost in all, ms | of a step | still writing after, ms |",
        "|---|---|---|---|---|---|",
    ]
    for mode, row in found.items():
        lines.append(
            f"| {mode} | {row['stopped_ms']:,.1f} | {row['stopped_of_a_step']:.1%} | {row['lost_ms']:,.1f} | "
            f"{row['lost_of_a_step']:.1%} | {row['still_writing_ms']:,.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, train and save, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--hidden-size", type=int, default=256)
    add("--layers", type=int, default=4)
    add("--sequence-length", type=int, default=256)
    add("--batch", type=int, default=8, help="samples of a step")
    add("--steps", type=int, default=3, help="steps after each save")
    add("--rounds", type=int, default=5)
    add("--folder", help="where the checkpoints go; by default a temporary folder")
    add_json_option(parser)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        config = run_config(Path(folder), given)
        found = measure(config, given.rounds, given.steps)
    parameters = parameter_count(config.model)
    head = (
        f"{parameters:,} parameters, {12 * parameters / 1e6:,.0f} MB of state, one process; "
        f"{given.steps} steps of {found['none']['step_ms']:,.0f} ms after each save\n"
    )
    report(head + table(found), {"settings": settings(given), "results": found}, given.json)


if __name__ == "__main__":
    main()
