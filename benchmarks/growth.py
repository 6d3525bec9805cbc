"""Measure how fast a checkpoint grows, against copying the same bytes with the same fsync, in one run."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from reporting import add_json_option, report
from torch import Tensor

from megatron_tokenformer.checkpoint import store
from megatron_tokenformer.checkpoint.grow import carry_out
from megatron_tokenformer.checkpoint.growth_plan import plan_growth
from megatron_tokenformer.checkpoint.manifest import STATES, Interval, Manifest
from megatron_tokenformer.checkpoint.shards import write_shard
from megatron_tokenformer.checkpoint.step_zero import in_bytes
from megatron_tokenformer.config.growth import Growth
from megatron_tokenformer.config.load import load_config
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.errors import UserError, run_cli
from megatron_tokenformer.model.language_model import full_shapes
from megatron_tokenformer.model.tau import initial_taus, taus_to_json

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = """example:
  python benchmarks/growth.py --rounds 5
  python benchmarks/growth.py --config configs/tokenformer-1.4b.yaml --folder /scratch   # 35 GB of disk

  Contenders run in turn, each into a new folder, after a sync; each round begins with another one, because
  deleting what one wrote can slow the next. "copy" is cp and fsync of the files of the grown checkpoint. Each
  runs in a process of its own that has imported torch, so that all find the machine in the same state: memory
  that was just freed is faster to write than memory that a virtual machine has given back. Start-up is told
  beside, and not in the seconds. The checkpoint that grows is made of random numbers, and has been read
  before, so where memory holds it, reading is from there.
"""
CONTENDERS = {"copy": "copy", "grow": "growth", "link": "growth --link", "trust": "growth --link --no-verify"}
_BLOCK = 256 * 1024


def write_checkpoint(folder: Path, config: RunConfig, ranks: int = 2, step: int = 10) -> Path:
    """Write a checkpoint of random numbers as `ranks` data-parallel ranks would, and return it.

    Each rank has an equal stretch of all parameters one after another.
    """
    shapes = full_shapes(config.model)
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    part = -(-sum(sizes.values()) // ranks)
    temporary = folder / store.temporary_name(step)
    store.make_empty(temporary)
    generator = torch.Generator().manual_seed(0)
    shards = []
    for rank in range(ranks):
        first, intervals = 0, []
        for name, size in sizes.items():
            start, stop = max(0, rank * part - first), min(size, (rank + 1) * part - first)
            if start < stop:
                intervals.append(Interval(name, start, stop))
            first += size
        count = len(STATES) * sum(i.stop - i.start for i in intervals)
        path = temporary / f"rank-{rank:05d}.safetensors"
        shards.append(write_shard(path, intervals, list(STATES), _random(count, generator)))
    manifest = Manifest(
        config=config.model_dump(mode="json"),
        step=step,
        position=step * config.training.global_batch_size,
        adam_step=step,
        taus=taus_to_json(initial_taus(config.model)),
        shapes={name: list(shape) for name, shape in shapes.items()},
        states=list(STATES),
        shards=shards,
    )
    return store.publish(temporary, manifest)


def _random(count: int, generator: torch.Generator) -> Iterator[Tensor]:
    for first in range(0, count, _BLOCK):
        yield torch.randn(min(_BLOCK, count - first), generator=generator)


def run_one(contender: str, source: str, config: str, reference: str, folder: str) -> dict[str, float]:
    """Grow or copy in this process: seconds, and the most memory that it had before and at the end, bytes."""
    verify = contender != "trust"
    link = contender in ("link", "trust")
    plan = plan_growth(Path(source), load_config(config), Path(folder), Growth(), link=link, verify=verify)
    before, start = peak_memory(), time.perf_counter()
    if contender == "copy":
        copy_durably(Path(reference), Path(folder))
    elif carry_out(plan).old_rows != ("linked" if link else "copied"):
        raise UserError(f"{folder} is on a file system without hard links", exit_code=1)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "memory_before": before, "memory": peak_memory()}


def peak_memory() -> int:
    """VmHWM of this process, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def copy_durably(grown: Path, folder: Path) -> None:
    """Copy the files of a checkpoint with cp, and fsync them and their folder."""
    folder.mkdir()
    for path in grown.iterdir():
        subprocess.run(["cp", str(path), str(folder / path.name)], check=True)
        fsync(folder / path.name)
    fsync(folder)


def fsync(path: Path) -> None:
    """Fsync a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def run_child(contender: str, *arguments: str) -> dict[str, float]:
    """`run_one` in a process of its own; also the seconds that the process took beyond that."""
    command = [sys.executable, __file__, "--one", contender, *arguments]
    start = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise UserError(f"{contender} failed: {done.stderr.strip()[-500:]}", exit_code=1)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {**figures, "start_up": time.perf_counter() - start - figures["seconds"]}


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All rounds; of each contender the median speed, and the median of its ratios to the copy."""
    source = write_checkpoint(folder / "old", load_config(args.old), args.ranks)
    plan = plan_growth(source, load_config(args.config), folder / "grown", Growth())
    grown = carry_out(plan).path
    size = sum(path.stat().st_size for path in grown.iterdir())
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    memory = dict.fromkeys(CONTENDERS, 0.0)
    for number in range(args.rounds):
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
        names = list(CONTENDERS)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            os.sync()
            out = folder / "out"
            done = run_child(name, str(source), args.config, str(grown), str(out))
            seconds[name].append(done["seconds"])
            memory[name] = max(memory[name], done["memory"] - done["memory_before"])
            shutil.rmtree(out)
    return {
        "old": args.old,
        "config": args.config,
        "bytes": size,
        "bytes_old": plan.old_bytes,
        "bytes_new": plan.new_bytes,
        "rounds": args.rounds,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg(),
        "start_up_seconds": done["start_up"],
        "memory_before_growth": done["memory_before"],
        "memory_more": memory,
        "seconds": seconds,
        # Of each round, for what disturbs a machine disturbs a whole round.
        "ratio": {
            name: median(copy / own for copy, own in zip(seconds["copy"], seconds[name]))
            for name in CONTENDERS
        },
    }


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    size = result["bytes"]
    rows = [
        f"{Path(result['old']).stem} to {Path(result['config']).stem}: {in_bytes(result['bytes_old'])} of "
        f"old rows, {in_bytes(result['bytes_new'])} of new ones; median of {result['rounds']} rounds (lowest "
        f"to highest); load average {result['load_average'][0]:.1f} on {result['cores']} cores; start-up "
        f"{result['start_up_seconds']:.1f} s and {in_bytes(int(result['memory_before_growth']))} of memory",
        "",
        "| | seconds | MB of state per second | speed of the copy | memory beyond start-up |",
        "|---|---|---|---|---|",
    ]
    for name, title in CONTENDERS.items():
        own = result["seconds"][name]
        spread = f"{median(own):.2f} ({min(own):.2f} to {max(own):.2f})"
        memory = in_bytes(int(result["memory_more"][name])) if name != "copy" else "-"
        rows.append(
            f"| {title} | {spread} | {size / 1e6 / median(own):,.0f} | {100 * result['ratio'][name]:.0f} % "
            f"| {memory} |"
        )
    return "\n".join(rows)


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(run_one(*sys.argv[2:])))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    configs = ROOT / "configs"
    add("--old", metavar="CONFIG", default=str(configs / "tokenformer-124m.yaml"), help="what grows (124M)")
    add("--config", default=str(configs / "tokenformer-354m.yaml"), help="what it grows to (default: 354M)")
    add("--ranks", type=int, default=2, metavar="N", help="shards of the old checkpoint (default: 2)")
    add("--rounds", type=int, default=3, metavar="N", help="of every contender in turn (default: 3)")
    add("--folder", default=".", help="disk to measure (default: that of this folder); all is removed again")
    add_json_option(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="growth-") as folder:
        result = measure(args, Path(folder))
    report(table(result), result, args.json)


if __name__ == "__main__":
    run_cli(main)
