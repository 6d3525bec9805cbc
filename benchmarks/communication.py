"""Measure the tensor-parallel collectives of a layer and a step: Tokenformers against GPTs of equal size.

Nothing is computed: each rank runs the collectives of `config/traffic.py`, with tensors of their sizes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from ladder import TWINS, twin_configs
from reporting import add_json_option, describe, report

from megatron_tokenformer.config.load import load_config
from megatron_tokenformer.config.schema import Parallel
from megatron_tokenformer.config.sizes import parameter_count
from megatron_tokenformer.config.traffic import (
    ACTIVATIONS,
    ELEMENT,
    Row,
    first_rows,
    last_rows,
    passes,
    sent,
    tokenformer_rows,
    transformer_rows,
)
from megatron_tokenformer.errors import UserError, run_cli
from megatron_tokenformer.parallel.environment import find_processes
from megatron_tokenformer.quiet import quiet_imports

with quiet_imports():
    from megatron_tokenformer.parallel import layout

EXAMPLE = """examples:
  torchrun --nproc-per-node 2 benchmarks/communication.py                     # on the CPU, small
  torchrun --nproc-per-node 8 benchmarks/communication.py --positions 8192    # 8 GPUs, nccl

  A round runs one layer of each model in turn, forward and backward; the next begins with another model.
  "All" is layers x layer, and the ends, measured likewise: embedding, head and loss. Times are without copies
  into other layouts, and without the products that a real step could hide some of this behind. "GPT's" are
  the GPT's bytes and milliseconds as multiples of the Tokenformer's above it.
"""


@dataclass(frozen=True)
class Model:
    """What is measured of one model: the rows of a layer and of the ends, and how many layers there are."""

    name: str
    parameters: int
    layers: int
    layer: list[Row]
    ends: list[Row]

    def sent(self, ranks: int) -> float:
        """Bytes that a rank sends for one micro-batch, by formula."""
        return self.layers * sent(passes(self.layer, ranks)) + sent(passes(self.ends, ranks))


def models(sizes: Sequence[str], positions: int, precision: str, sequence: bool) -> list[Model]:
    """A Tokenformer and the GPT of equal size, for each of the sizes."""
    found = []
    for size in sizes:
        for (name, path), rows in zip(twin_configs(size).items(), (tokenformer_rows, transformer_rows)):
            model = load_config(path).model
            shape = model.hidden_size, positions, ELEMENT[precision], sequence
            ends = first_rows(*shape) + last_rows(*shape)
            found.append(Model(name, parameter_count(model), model.layers, rows(*shape), ends))
    return found


def measure(given: argparse.Namespace, here: layout.Layout) -> dict[str, Any]:
    """Time every model in turn: the slowest rank's seconds of a layer and of the ends, for each round."""
    contenders = models(given.sizes, given.positions, given.precision, here.tensor.sequence)
    seconds: list[list[tuple[float, float]]] = [[] for _ in contenders]
    for round_ in range(given.rounds + 1):
        for i in range(len(contenders)):
            at = (round_ + i) % len(contenders)
            model = contenders[at]
            times = tuple(run_rows(rows, given.precision, here) for rows in (model.layer, model.ends))
            if round_:  # the first opens connections and warms up
                seconds[at].append(times)
    return {
        "precision": given.precision,
        "positions": given.positions,
        "sequence": here.tensor.sequence,
        "ranks": here.tensor.size,
        "rounds": given.rounds,
        "models": [figures(model, here.tensor.size, times) for model, times in zip(contenders, seconds)],
        "gpt_to_tokenformer": [
            ratios(*seconds[i : i + 2], *contenders[i : i + 2], here.tensor.size)
            for i in range(0, len(contenders), 2)
        ],
        "backend": dist.get_backend(here.tensor.group),
        "environment": describe(str(here.device)),
    }


def run_rows(rows: list[Row], precision: str, here: layout.Layout) -> float:
    """Run the collectives of the rows once, forward and backward; the slowest rank's seconds."""
    group, ranks = here.tensor.group, here.tensor.size
    narrow = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    calls = []
    for one in passes(rows, ranks):
        dtype = narrow if one.purpose == ACTIVATIONS else torch.float32
        whole = torch.zeros(one.bytes // dtype.itemsize, dtype=dtype, device=here.device)
        calls.append((one.kind, whole, torch.empty_like(whole[: len(whole) // ranks])))
    wait(here)
    dist.barrier(group)
    start = time.perf_counter()
    for kind, whole, mine in calls:
        if kind == "all-reduce":
            dist.all_reduce(whole, group=group)
        elif kind == "all-gather":
            dist.all_gather_into_tensor(whole, mine, group=group)
        else:
            dist.reduce_scatter_tensor(mine, whole, group=group)
    wait(here)
    taken = torch.tensor(time.perf_counter() - start, dtype=torch.float64, device=here.device)
    dist.all_reduce(taken, op=dist.ReduceOp.MAX, group=group)
    return float(taken)


def wait(here: layout.Layout) -> None:
    """Until this rank's GPU has done what it was given."""
    if here.device.type == "cuda":
        torch.cuda.synchronize()


def figures(model: Model, ranks: int, times: list[tuple[float, float]]) -> dict[str, Any]:
    """One model's bytes by formula, and medians of its times."""
    return {
        "name": model.name,
        "parameters": model.parameters,
        "layers": model.layers,
        "sent_bytes": model.sent(ranks),
        "layer_seconds": median(layer for layer, _ in times),
        "seconds": median(step_seconds(model, one) for one in times),
    }


def step_seconds(model: Model, times: tuple[float, float]) -> float:
    """All layers and the ends, for one micro-batch."""
    return model.layers * times[0] + times[1]


def ratios(
    ours: list[tuple[float, float]], theirs: list[tuple[float, float]], mine: Model, gpt: Model, ranks: int
) -> dict[str, float]:
    """How many times the Tokenformer's the GPT's bytes and seconds are; of each round, then the median."""
    each = [step_seconds(gpt, t) / step_seconds(mine, o) for o, t in zip(ours, theirs)]
    return {"bytes": gpt.sent(ranks) / mine.sent(ranks), "seconds": median(each)}


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    on = result["environment"]
    rows = [
        f"{result['ranks']} ranks, {result['backend']}, {on['device']}, {on['cores']} cores; "
        f"{result['positions']} positions "
        f"in {result['precision']}{', sequence parallel' if result['sequence'] else ''}; median of "
        f"{result['rounds']} rounds; load average {on['load_average'][0]:.1f}",
        "",
        "| model | parameters, M | layers | a rank sends, MB | a layer, ms | all, ms | GPT's MB | GPT's ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for i, model in enumerate(result["models"]):
        ratio = result["gpt_to_tokenformer"][i // 2]
        against = f"{ratio['bytes']:.2f} x | {ratio['seconds']:.2f} x" if i % 2 else "|"
        rows.append(
            f"| {model['name']} | {model['parameters'] / 1e6:,.1f} | {model['layers']} | "
            f"{model['sent_bytes'] / 1e6:,.1f} | {1e3 * model['layer_seconds']:,.2f} | "
            f"{1e3 * model['seconds']:,.1f} | {against} |"
        )
    return "\n".join(rows)


def main() -> int:
    """Parse the command line, join the other ranks, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sizes", nargs="+", choices=list(TWINS), default=list(TWINS), metavar="SIZE", help="124m ... 1.4b")
    add("--positions", type=int, default=512, help="of a micro-batch: sequences x their length")
    add("--precision", choices=("bf16", "fp32"), default="bf16", help="of activations")
    add("--sequence", action="store_true", help="with sequence parallelism")
    add("--rounds", type=int, default=5)
    add_json_option(parser)
    given = parser.parse_args()
    processes = find_processes()
    ranks = processes.world_size
    if ranks < 2:
        raise UserError("one process exchanges nothing; start with torchrun --nproc-per-node 2")
    paths = (path for size in given.sizes for path in twin_configs(size).values())
    sizes = (load_config(path).model.hidden_size for path in paths)
    if any(size % ranks for size in (*sizes, given.positions)):
        raise UserError(f"{ranks} ranks do not divide --positions {given.positions} and every model's width")
    here = layout.start(Parallel(tensor=ranks, sequence=given.sequence), processes)
    result = measure(given, here)
    if here.is_main:
        report(table(result), result, given.json)
    layout.stop()
    return 0


if __name__ == "__main__":
    run_cli(main)
