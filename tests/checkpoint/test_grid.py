"""What one layout saved every other loads, on 1 to 8 processes, with a growth between.

A relay: each layout loads what the one before it saved, saves it again at once, and trains on.  What it saves
at once must have the same bytes as what the relay began with, so that every layout's loading and saving is
held against all those before it; and its losses must be those of one process that went the same way.  So
a handful of runs covers what would take the square of them in pairs.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from megatron_tokenformer.checkpoint.store import step_name
from megatron_tokenformer.config.growth import Growth
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.metrics_file import read_rows
from megatron_tokenformer.parallel.layout import Layout
from megatron_tokenformer.training.loop import save, train_steps
from megatron_tokenformer.training.run import open_run
from tests.checkpoint.growing import grow
from tests.ranks import run_ranks
from tests.toy import toy_config

BATCH = 120
"""divisible by every data-parallel size here"""
FIRST = {"qkv": 16, "output": 16, "ffn": 64}
GROWN = {"qkv": 32, "output": 24, "ffn": 96}
TAU_STEPS = 4
"""more than a leg after the growth has, so that tau is saved and loaded on its way"""


class Split(NamedTuple):
    """A layout, and the micro-batches of a step."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence: bool = False
    accumulation: int = 1

    @property
    def processes(self) -> int:
        return self.tensor * self.pipeline * self.data


ONE = Split()
BEFORE = [
    Split(data=3, accumulation=2),
    Split(tensor=8),
    Split(pipeline=4, data=2, accumulation=4),
]
AFTER = [
    Split(data=8),
    Split(tensor=2, pipeline=2, data=2, accumulation=2),
    Split(tensor=2, data=3, sequence=True),
    Split(data=5),
    ONE,
    Split(tensor=4, pipeline=2, sequence=True, accumulation=2),
]
GOING_ON = [Split(pipeline=2, accumulation=3), Split(tensor=2, pipeline=2, sequence=True, accumulation=2)]


def leg_config(
    folder: Path, name: str, split: Split, load: Path | None, steps: int, tokens: Any
) -> RunConfig:
    config = toy_config(
        folder,
        model={"layers": 4, "attention_heads": 8, "tokens": tokens},
        parallel={"tensor": split.tensor, "pipeline": split.pipeline, "sequence": split.sequence},
        data={"sequence_length": 8},
        # With the usual eps AdamW takes steps of full size from gradients that are nothing but rounding.
        optimizer={"schedule": "constant", "eps": 1e-5},
        training={
            "steps": steps,
            "global_batch_size": BATCH,
            "micro_batch_size": BATCH // split.data // split.accumulation,
            "eval_steps": 1,
        },
        checkpoint={"load": str(load) if load else None},
    )
    return config.model_copy(update={"run_dir": str(folder / name)})


def save_and_train(layout: Layout, config: RunConfig) -> None:
    with open_run(config, layout) as run:
        save(run)
        train_steps(run)


class Leg(NamedTuple):
    """What a run loaded and saved again at once, what it saved in the end, and how it trained."""

    at_once: Path
    end: Path
    rows: list[dict[str, Any]]


def run_leg(
    folder: Path, name: str, split: Split, load: Path | None, steps: tuple[int, int], tokens: Any
) -> Leg:
    """Load at steps[0] and train to steps[1]."""
    config = leg_config(folder, name, split, load, steps[1], tokens)
    run_ranks(
        split.processes, save_and_train, config, **config.parallel.model_dump(exclude={"timeout_minutes"})
    )
    checkpoints = folder / name / "checkpoints"
    at_once, end = (checkpoints / step_name(step) for step in steps)
    return Leg(at_once, end, read_rows(folder / name / "metrics.jsonl"))


def stored_bytes(checkpoint: Path) -> dict[tuple[str, str], bytes]:
    """Every tensor's states, put together from the files with nothing but their format in hand."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    whole = {
        (name, state): np.zeros(math.prod(shape), "<u4")
        for name, shape in manifest["shapes"].items()
        for state in manifest["states"]
    }
    times = {key: np.zeros(len(values), int) for key, values in whole.items()}
    for shard in manifest["shards"]:
        content = (checkpoint / shard["file"]).read_bytes()
        (length,) = struct.unpack_from("<Q", content)
        header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
        for name, start, stop in shard["intervals"]:
            for state in manifest["states"]:
                first, last = header[f"{name}/{state}/{start}"]["data_offsets"]
                whole[name, state][start:stop] = np.frombuffer(data[first:last], "<u4")
                times[name, state][start:stop] += 1
    assert all((count == 1).all() for count in times.values())
    return {key: values.tobytes() for key, values in whole.items()}


def facts(checkpoint: Path) -> dict[str, Any]:
    """What a manifest says beside the tensors' places; but for the run that it is of."""
    manifest: dict[str, Any] = json.loads((checkpoint / "manifest.json").read_text())
    apart = ("shards", "layout", "config")
    return {key: value for key, value in manifest.items() if key not in apart}


def trained(rows: list[dict[str, Any]]) -> list[tuple[float, ...]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


def assert_close(rows: list[dict[str, Any]], expected: list[dict[str, Any]], steps: tuple[int, int]) -> None:
    """The losses and gradient norms of the steps after steps[0], up to steps[1]."""
    here, there = trained(rows), [row for row in trained(expected) if steps[0] < row[0] <= steps[1]]
    assert len(here) == len(there) == steps[1] - steps[0]
    for row, one in zip(here, there):
        assert row == pytest.approx(one, abs=1e-5, rel=0)


def relay(
    folder: Path, splits: list[Split], load: Path, steps: tuple[int, int], tokens: dict[str, int]
) -> list[Leg]:
    """Each layout loads what the one before it saved at once."""
    legs: list[Leg] = []
    for split in splits:
        name = f"{folder.name}-{len(list(folder.iterdir()))}"
        legs.append(run_leg(folder, name, split, load, steps, tokens))
        load = legs[-1].at_once
    return legs


def check(splits: list[Split], legs: list[Leg], load: Path, one: Leg, steps: tuple[int, int]) -> None:
    """The layouts saved at once what they loaded, and trained from there as one process did."""
    expected, told = stored_bytes(load), facts(load)
    for split, leg in zip(splits, legs, strict=True):
        assert stored_bytes(leg.at_once) == expected, split
        # The first thing that a run does with a grown model is to evaluate it.
        apart = {"val_loss": told["val_loss"], "source_tokens": told["source_tokens"]}
        assert {**facts(leg.at_once), **apart} == told, split
        assert_close(leg.rows, one.rows, steps)


class Way(NamedTuple):
    """How one process went: steps 0 to 2, to 4; a growth; steps 0 to 4."""

    first: Leg
    second: Leg


def grow_to(folder: Path, source: Path, name: str) -> Path:
    target = leg_config(folder, name, ONE, None, 4, GROWN)
    path, _ = grow(source, target, folder / f"{name}-grown", Growth(tau="anneal", tau_steps=TAU_STEPS))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("grid")


@pytest.fixture(scope="module")
def one(folder: Path) -> Way:
    begun = run_leg(folder, "begun", ONE, None, (0, 2), FIRST)
    first = run_leg(folder, "first", ONE, begun.end, (2, 4), FIRST)
    return Way(first, run_leg(folder, "second", ONE, grow_to(folder, first.end, "one"), (0, 4), GROWN))


@pytest.fixture(scope="module")
def before(folder: Path, one: Way) -> list[Leg]:
    return relay(folder, BEFORE, one.first.at_once, (2, 4), FIRST)


@pytest.fixture(scope="module")
def grown(folder: Path, before: list[Leg]) -> Path:
    """What the last layout trained, grown."""
    return grow_to(folder, before[-1].end, "relay")


@pytest.fixture(scope="module")
def after(folder: Path, grown: Path) -> list[Leg]:
    return relay(folder, AFTER, grown, (0, 2), GROWN)


def test_before_a_growth_every_layout_goes_on_from_every_other(before: list[Leg], one: Way) -> None:
    check(BEFORE, before, one.first.at_once, one.first, (2, 4))


def test_after_a_growth_every_layout_goes_on_from_every_other(
    after: list[Leg], grown: Path, one: Way
) -> None:
    check(AFTER, after, grown, one.second, (0, 2))


def test_they_go_on_while_tau_is_on_its_way(folder: Path, after: list[Leg], one: Way) -> None:
    load = after[-1].end
    legs = relay(folder, GOING_ON, load, (2, 4), GROWN)
    check(GOING_ON, legs, load, one.second, (2, 4))
    assert facts(legs[-1].end)["taus"]["ffn"] == {"start": 8.0, "end": math.sqrt(96), "steps": TAU_STEPS}
