"""Opening a dataset and reading samples: ours, megatron-core's GPTDataset, and a bare memory map.

One dataset of Megatron's format is made and opened by all three.  Samples are then read in rounds that take
turns, so that a busy machine is busy for all; what counts are ratios.

    python benchmarks/loader.py --documents 300000 --rounds 5

With --cold, instead: how long micro-batches of eight samples are waited for, from the disk and from memory,
if the disk is at work on each while the one before is computed, as in training, and if it is not.

    python benchmarks/loader.py --documents 5000000 --cold
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from reporting import add_json_option, report, settings

from megatron_tokenformer.checkpoint.shards import drop_from_cache
from megatron_tokenformer.data.batches import Blend, micro_batches, open_blend
from megatron_tokenformer.data.indexed import TokenFileWriter
from megatron_tokenformer.quiet import quiet_imports, quiet_start

with quiet_imports():
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

Reader = Callable[[int], Any]

MICRO_BATCH = 8
COLD_SAMPLES = 1600
"""in each round, of each way to read"""
PAUSE_S = 0.02
"""between two micro-batches, in place of computing one"""


class _Tokenizer:
    """What GPTDataset asks of a tokenizer."""

    eod, pad, vocab_size, unique_identifiers = 0, 0, 50_304, {"class": "benchmark"}


def write_dataset(prefix: str, documents: int, mean_length: int) -> None:
    """Documents of random ids and geometric lengths."""
    random = np.random.default_rng(0)
    with TokenFileWriter(prefix, np.dtype("uint16")) as writer:
        for start in range(0, documents, 100_000):
            lengths = random.geometric(1 / mean_length, size=min(100_000, documents - start))
            writer.add(random.integers(1, 50_000, lengths.sum(), dtype=np.uint16), lengths)
        writer.finish()


def open_ours(prefix: str, length: int, samples: int, cache: str) -> Reader:
    """Our blend of one source."""
    blend = open_blend([(1.0, prefix)], length, seed=1234)
    return lambda i: blend[i]


def open_megatron(prefix: str, length: int, samples: int, cache: str) -> Reader:
    """megatron-core's GPTDataset over all documents, its index built and cached."""
    with quiet_start():
        config = GPTDatasetConfig(
            random_seed=1234,
            sequence_length=length,
            blend=([prefix], None),
            split="100,0,0",
            path_to_cache=cache,
            tokenizer=_Tokenizer(),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            mid_level_dataset_surplus=0.005,
        )
        indexed = IndexedDataset(prefix, mmap=True)
        indices = np.arange(len(indexed.document_indices) - 1, dtype=np.int32)
        dataset = GPTDataset(indexed, prefix, indices, samples, Split.train, config)
    return lambda i: dataset[i]


def open_bare(prefix: str, length: int, samples: int, cache: str) -> Reader:
    """Windows of a memory map in a shuffled order, and nothing else."""
    tokens = np.memmap(f"{prefix}.bin", dtype=np.uint16, mode="r")
    order = np.random.default_rng(1234).permutation((len(tokens) - 1) // length)
    return lambda i: tokens[order[i] * length : order[i] * length + length + 1].astype(np.int64)


OPENERS = {
    "ours": open_ours,
    "megatron-core GPTDataset": open_megatron,
    "bare memory map": open_bare,
}


def measure(prefix: str, length: int, samples: int, rounds: int, cache: str) -> dict[str, dict[str, float]]:
    """CPU milliseconds to open, and the median of the rounds' CPU microseconds per sample."""
    found: dict[str, dict[str, float]] = {}
    readers = {}
    for name, opener in OPENERS.items():
        started = time.process_time()
        readers[name] = opener(prefix, length, samples, cache)
        found[name] = {"open_cpu_ms": 1e3 * (time.process_time() - started)}
    times: dict[str, list[float]] = {name: [] for name in readers}
    for round_ in range(rounds):
        positions = range(round_ * samples // rounds, (round_ + 1) * samples // rounds)
        for name, read in readers.items():
            started = time.process_time()
            for position in positions:
                read(position)
            times[name].append(1e6 * (time.process_time() - started) / len(positions))
    for name, values in times.items():
        found[name]["sample_cpu_us"] = statistics.median(values)
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """The figures as Markdown, with ratios to ours."""
    lines = [
        "| reader | open, CPU ms | CPU us per sample | against ours |",
        "|---|---|---|---|",
    ]
    ours = found["ours"]["sample_cpu_us"]
    for name, row in found.items():
        lines.append(
            f"| {name} | {row['open_cpu_ms']:,.1f} | {row['sample_cpu_us']:.1f} | "
            f"{row['sample_cpu_us'] / ours:.1f} |"
        )
    return "\n".join(lines)


def when_asked(blend: Blend, position: int) -> Iterator[Any]:
    """Micro-batches whose samples are read when they are asked for."""
    for start in count(position, MICRO_BATCH):
        yield np.stack([blend[start + i] for i in range(MICRO_BATCH)])


def one_ahead(blend: Blend, position: int) -> Iterator[Any]:
    """Micro-batches as training reads them."""
    return micro_batches(blend, position, MICRO_BATCH, 1)


WAYS = {"when asked for": when_asked, "one micro-batch ahead": one_ahead}


def measure_cold(prefix: str, length: int, rounds: int) -> dict[str, dict[str, float]]:
    """Medians of the rounds' microseconds that a sample is waited for, from the disk and then from memory."""
    times: dict[str, dict[str, list[float]]] = {name: {"disk_us": [], "memory_us": []} for name in WAYS}
    for round_ in range(rounds):
        for place, name in enumerate(WAYS if round_ % 2 else reversed(WAYS)):
            position = (2 * round_ + place) * COLD_SAMPLES
            drop_from_cache(Path(f"{prefix}.bin"))
            for kind in ("disk_us", "memory_us"):
                times[name][kind].append(_waited(prefix, length, WAYS[name], position))
    return {
        name: {kind: statistics.median(values) for kind, values in kinds.items()}
        for name, kinds in times.items()
    }


def _waited(prefix: str, length: int, way: Callable[[Blend, int], Iterator[Any]], position: int) -> float:
    # Opened anew: pages that a map holds are not dropped.
    batches = way(open_blend([(1.0, prefix)], length, seed=1234), position)
    waited = []
    # One less than there are, for the last asks for one more.
    for _ in range(COLD_SAMPLES // MICRO_BATCH - 1):
        started = time.perf_counter()
        next(batches)
        waited.append(time.perf_counter() - started)
        time.sleep(PAUSE_S)
    # The first is left out: nobody could have asked for it earlier.
    return 1e6 * statistics.mean(waited[1:]) / MICRO_BATCH


def cold_table(found: dict[str, dict[str, float]]) -> str:
    """The figures as Markdown."""
    lines = ["| read | from the disk, us per sample | from memory, us per sample |", "|---|---|---|"]
    lines += [f"| {name} | {row['disk_us']:.1f} | {row['memory_us']:.1f} |" for name, row in found.items()]
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, make the dataset, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--documents", type=int, default=300_000)
    add("--mean-length", type=int, default=400, help="tokens of a document, on average")
    add("--sequence-length", type=int, default=2048)
    add("--rounds", type=int, default=5)
    add("--cold", action="store_true", help="measure waiting for micro-batches from the disk instead")
    add_json_option(parser)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prefix = str(Path(folder) / "benchmark_text_document")
        write_dataset(prefix, given.documents, given.mean_length)
        length = given.sequence_length
        samples = given.documents * given.mean_length // length * 9 // 10
        if given.cold:
            found = measure_cold(prefix, length, given.rounds)
            samples, shown = 2 * given.rounds * COLD_SAMPLES, cold_table(found)
        else:
            found = measure(prefix, length, samples, given.rounds, folder)
            shown = table(found)
    head = f"{given.documents:,} documents, samples of {length} tokens, {samples:,} samples read\n"
    report(head + shown, {"settings": settings(given), "results": found}, given.json)


if __name__ == "__main__":
    main()
