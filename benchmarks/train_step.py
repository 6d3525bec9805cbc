"""One optimizer step of a real run: each Tokenformer against its dense twin of equal size, if it has one."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from ladder import CONFIGS, SIZES, TWINS, twin_configs
from reporting import add_json_option, describe, report, settings

from megatron_tokenformer.config.estimate import POLICIES
from megatron_tokenformer.config.load import load_config
from megatron_tokenformer.config.schema import RunConfig, check_world
from megatron_tokenformer.config.sizes import parameter_count
from megatron_tokenformer.data.indexed import TokenFileWriter
from megatron_tokenformer.errors import UserError, run_cli
from megatron_tokenformer.parallel.environment import find_processes, free_port, set_device_variables
from megatron_tokenformer.quiet import quiet_imports

ROOT = CONFIGS.parent
WARM_UP = 2
EXAMPLE = """examples:
  python benchmarks/train_step.py --micro-batch 16 --json benchmarks/results/train-step.json     # one GPU
  python benchmarks/train_step.py --layers 1 --sequence-length 128 --micro-batch 1               # no GPU
  torchrun --nproc-per-node 8 benchmarks/train_step.py --recompute scores parallel.tensor=2

  A round runs every contender once, in a process of its own, so that each finds the device empty and its peak
  of memory is its own; rounds begin with another contender in turn. A process opens a run on random tokens,
  makes two steps to warm up and then --steps steps, each waited for. A round's figure is the median of its
  steps. "Tokenformer / GPT" is the median over the rounds of the ratio of tokens per second; a size without a
  twin has none. FLOPs are those of config/sizes.py: products only, none twice. Memory is of the
  rank that has held most: allocated on a GPU, else resident, imports included.
"""


def run_config(name: str, prefix: str, folder: Path, given: argparse.Namespace) -> RunConfig:
    """A contender's run on the benchmark's data, that never comes to its last step.

    With --layers a twin keeps its proportion of layers, so that both are still about equal in size.
    """
    paths = next(configs for configs in map(twin_configs, SIZES) if name in configs)
    recompute = given.recompute
    if recompute == "scores" and name.startswith("GPT"):
        recompute = "none"  # it has no scores
    overrides = [
        f"run_dir={folder / 'run'}",
        f"data.train={prefix}",
        "data.validation=[]",
        "data.tokenizer=null",
        f"data.sequence_length={given.sequence_length}",
        f"training.micro_batch_size={given.micro_batch}",
        f"training.recompute={recompute}",
        "optimizer.warmup_steps=0",
        *given.overrides,
    ]
    if given.layers:
        ours, own = (load_config(path).model.layers for path in (next(iter(paths.values())), paths[name]))
        overrides.append(f"model.layers={max(given.layers * own // ours, 1)}")
    config = load_config(paths[name], overrides)
    parallel = config.parallel
    data_ranks = find_processes().world_size // (parallel.tensor * parallel.pipeline)
    size = given.micro_batch * max(data_ranks, 1) * given.accumulation
    training = config.training.model_copy(update={"global_batch_size": size})
    config = config.model_copy(update={"training": training})
    check_world(config, find_processes().world_size)
    return config


def write_tokens(folder: Path, vocabulary: int, count: int) -> str:
    """A dataset of random tokens; its prefix."""
    prefix = str(folder / "benchmark_text_document")
    with TokenFileWriter(prefix, np.dtype("uint16")) as writer:
        tokens = np.random.default_rng(0).integers(0, min(vocabulary, 65_500), count).astype(np.uint16)
        writer.add(tokens, np.array([count]))
        writer.finish()
    return prefix


def run_one(name: str, given: argparse.Namespace) -> None:
    """Train in this process as one of a contender's; the first prints the figures as its last line."""
    processes = find_processes()
    config = run_config(name, "unknown", Path(), given)
    set_device_variables(config.parallel)
    with quiet_imports():
        from megatron_tokenformer.parallel import layout
        from megatron_tokenformer.training.run import open_run
        from megatron_tokenformer.training.throughput import throughput

    here = layout.start(config.parallel, processes)
    folder = layout.from_main_rank(lambda: Path(tempfile.mkdtemp(prefix="train-step-", dir=given.folder)))
    try:
        count = 8 * config.training.global_batch_size * given.sequence_length + 1
        prefix = layout.from_main_rank(lambda: write_tokens(folder, config.model.vocab_size, count))
        config = run_config(name, prefix, folder, given)
        with contextlib.redirect_stdout(io.StringIO()), open_run(config, here) as run:
            seconds = list(timed_steps(run, given.steps))
            figures = throughput(config, here, run.engine.precision, run.accumulation, median(seconds))
            figures |= {"step_s": median(seconds), "precision": run.engine.precision}
    finally:
        if here.is_main:
            shutil.rmtree(folder, ignore_errors=True)
    if here.is_main:
        figures |= {"parameters": parameter_count(config.model), "layers": config.model.layers}
        surroundings = {"layout": str(here), "environment": describe(str(here.device))}
        print(json.dumps({**figures, **surroundings, "steps": seconds}))
    layout.stop()


def timed_steps(run: Any, steps: int) -> Iterator[float]:
    """Seconds of each step after the warm-up."""
    from megatron_tokenformer.training.batches import pipeline_batches
    from megatron_tokenformer.training.loop import train_step

    batches = pipeline_batches(run.training_data, 0, run.config, run.layout, run.accumulation, run.eod_id)
    for step in range(WARM_UP + steps):
        begun = time.perf_counter()
        train_step(run, batches).item()  # asking for the loss waits for the device
        if step >= WARM_UP:
            yield time.perf_counter() - begun


def agreed_ports() -> Callable[[int], int]:
    """A function that gives all ranks the same port for the child of this number, free on the first's host.

    The ranks' parents meet at the launcher's own address, which some launchers keep for themselves, so that
    children cannot meet there.
    """
    here = find_processes()
    if here.world_size == 1:
        return lambda number: free_port()
    from torch.distributed.rendezvous import rendezvous

    os.environ.update(MASTER_ADDR=here.master_address, MASTER_PORT=str(here.master_port))
    store, _, _ = next(rendezvous("env://", here.rank, here.world_size))

    def port(number: int) -> int:
        if here.rank == 0:
            store.set(f"port of child {number}", str(free_port()))
        return int(store.get(f"port of child {number}"))

    return port


def run_child(name: str, port: int) -> dict[str, Any]:
    """`run_one` in a process of its own, with this rank's place among the others, who meet at this port."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TORCHELASTIC_")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    environment["MASTER_PORT"] = str(port)
    command = [sys.executable, __file__, "--one", name, *sys.argv[1:]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise UserError(f"{name} failed: {done.stderr.strip()[-500:]}", exit_code=1)
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {}


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """All rounds of all contenders; of each the medians, and of each size the ratio to its twin."""
    names = [name for size in given.configs for name in twin_configs(size)]
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    main, port = find_processes().rank == 0, agreed_ports()
    for number in range(given.rounds):
        turn = number % len(names)
        for place, name in enumerate(names[turn:] + names[:turn]):
            rounds[name].append(run_child(name, port(number * len(names) + place)))
            if main:
                print(f"round {number + 1}: {name} {rounds[name][-1]['step_s']:.3f} s", file=sys.stderr)
    if not main:
        return {}
    pairs = {size: list(twin_configs(size)) for size in given.configs if size in TWINS}
    return {
        "settings": settings(given),
        "environment": rounds[names[0]][0]["environment"],  # torch, and the GPU, are the children's
        "contenders": rounds,
        "tokenformer_to_gpt": {
            size: [a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(rounds[ours], rounds[twin])]
            for size, (ours, twin) in pairs.items()
        },
    }


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    given, on = result["settings"], result["environment"]
    first = next(iter(result["contenders"].values()))[0]
    lines = [
        f"{on['device']}, {on['cores']} cores, load average {on['load_average'][0]:.1f}; {first['layout']}; "
        f"{first['precision']}, {given['accumulation']} x {given['micro_batch']} sequences of "
        f"{given['sequence_length']} a rank and step, recompute {given['recompute']}; "
        f"{given['rounds']} rounds of {given['steps']} steps",
        "",
        "| | parameters, M | layers | step, ms (lowest to highest) | tokens/s | TFLOP/s a device | MFU "
        "| peak memory, GB | Tokenformer / GPT |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for size in given["configs"]:
        ratios = result["tokenformer_to_gpt"].get(size)
        ratio = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "-"
        for name, last in zip(twin_configs(size), ("", ratio) if ratios else (ratio,)):
            rounds = result["contenders"][name]
            own = {
                key: [one[key] for one in rounds] for key in rounds[0] if key not in ("steps", "environment")
            }
            ms = [1e3 * s for s in own["step_s"]]
            mfu = f"{median(own['mfu']):.1%}" if "mfu" in own else "-"
            lines.append(
                f"| {name} | {own['parameters'][0] / 1e6:,.1f} | {own['layers'][0]} "
                f"| {median(ms):,.1f} ({min(ms):,.1f} to {max(ms):,.1f}) "
                f"| {median(own['tokens_per_s']):,.0f} | {median(own['tflops_per_device']):.3g} | {mfu} "
                f"| {max(own['peak_memory_bytes']) / 1e9:.2f} | {last} |"
            )
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    help = f"{', '.join(SIZES)} (default: {' '.join(TWINS)}, which have a twin)"
    add("--configs", nargs="+", choices=SIZES, default=list(TWINS), metavar="SIZE", help=help)
    add("--micro-batch", type=int, default=8, metavar="N", help="sequences at once (default: 8)")
    add("--accumulation", type=int, default=1, metavar="N", help="micro-batches of a step (default: 1)")
    add("--sequence-length", type=int, default=1024, metavar="N")
    add("--steps", type=int, default=10, metavar="N", help="timed in a round (default: 10)")
    add("--rounds", type=int, default=3, metavar="N")
    help = "of the twin, which has no scores, none instead of scores"
    add("--recompute", choices=POLICIES, default="none", help=help)
    help = "of the Tokenformer instead of its own, the twin's in proportion: for machines without a GPU"
    add("--layers", type=int, metavar="N", help=help)
    add("--folder", help="where the data go, and are removed again; of several hosts, one that all have")
    add("--one", help=argparse.SUPPRESS)
    add_json_option(parser)
    add("overrides", nargs="*", metavar="section.key=value", help="changes to all configs")
    given = parser.parse_intermixed_args()
    for option in ("micro_batch", "accumulation", "sequence_length", "steps", "rounds", "layers"):
        number = getattr(given, option)
        if number is not None and number < 1:
            raise UserError(f"--{option.replace('_', '-')} {number} is not above 0")
    return given


def main() -> int:
    """Measure and print; or be one contender's process."""
    given = parse_arguments()
    if given.one:
        run_one(given.one, given)
        return 0
    for size in given.configs:
        for name in twin_configs(size):
            run_config(name, "unknown", Path(), given)  # refused here, not in the third process
    result = measure(given)
    if result:
        report(table(result), result, given.json)
    return 0


if __name__ == "__main__":
    run_cli(main)
