"""Opening a dataset and reading samples: ours, megatron-core's GPTDataset, and a bare memory map.

One dataset of Megatron's format is made and opened by all three.  Samples are then read in rounds that take
turns, so that a busy machine is busy for all; what counts are ratios.

    python benchmarks/loader.py --documents 300000 --rounds 5
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from reporting import add_json_option, report, settings

from megatron_tokenformer.data.batches import open_blend
from megatron_tokenformer.data.indexed import TokenFileWriter
from megatron_tokenformer.quiet import quiet_imports, quiet_start

with quiet_imports():
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

Reader = Callable[[int], Any]


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
    add_json_option(parser)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prefix = str(Path(folder) / "benchmark_text_document")
        write_dataset(prefix, given.documents, given.mean_length)
        samples = given.documents * given.mean_length // given.sequence_length * 9 // 10
        found = measure(prefix, given.sequence_length, samples, given.rounds, folder)
    length = given.sequence_length
    head = f"{given.documents:,} documents, samples of {length} tokens, {samples:,} samples read\n"
    report(head + table(found), {"settings": settings(given), "results": found}, given.json)


if __name__ == "__main__":
    main()
