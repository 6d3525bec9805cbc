"""Times by phase, throughput, and the traces that --profile writes."""

from __future__ import annotations

import gzip
import json
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.config.sizes import flops_per_token
from megatron_tokenformer.metrics_file import read_rows
from megatron_tokenformer.model.ends import FinalNorm
from megatron_tokenformer.parallel.layout import Layout
from megatron_tokenformer.training.loop import train
from megatron_tokenformer.training.metrics import PHASES
from megatron_tokenformer.training.phases import StepClock
from megatron_tokenformer.training.throughput import peak_memory_bytes
from tests.ranks import run_ranks
from tests.toy import toy_config


def profile_toy(layout: Layout, config: RunConfig, steps: int) -> None:
    train(config, layout, steps)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunConfig]:
    """A run on two tensor-parallel and two data-parallel ranks, of which two steps were traced."""
    folder = tmp_path_factory.mktemp("phases")
    config = toy_config(folder, parallel={"tensor": 2}, training={"micro_batch_size": 2})
    run_ranks(4, profile_toy, config, 2, tensor=2)
    return folder / "run", config


def test_phases_are_parts_of_the_step_and_rates_follow_from_it(run: tuple[Path, RunConfig]) -> None:
    folder, config = run
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "loss" in row]
    assert len(rows) == 10
    for row in rows:
        phases = [row[f"{name}_time_s"] for name in PHASES if name != "pipeline"]
        assert all(seconds > 0 for seconds in phases)
        assert sum(phases) < row["step_time_s"]
        tokens = 8 * 32
        assert row["tokens_per_s"] == pytest.approx(tokens / row["step_time_s"])
        flops = tokens * flops_per_token(config.model, 32) / 4
        assert row["tflops_per_device"] == pytest.approx(flops / row["step_time_s"] / 1e12)
        assert row["peak_memory_bytes"] > 100e6, "torch alone is larger"


def test_a_trace_of_each_rank_of_one_replica_holds_the_steps_asked_for(run: tuple[Path, RunConfig]) -> None:
    folder, _ = run
    assert sorted(path.name for path in (folder / "profile").iterdir()) == [
        "rank-00000.trace.json.gz",
        "rank-00000.txt",
        "rank-00001.trace.json.gz",
        "rank-00001.txt",
    ]
    with gzip.open(folder / "profile" / "rank-00000.trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    names = [event.get("name", "") for event in events]
    steps = sorted(name for name in set(names) if name.startswith("ProfilerStep#"))
    assert steps == ["ProfilerStep#3", "ProfilerStep#4"]
    assert any("mm" in name for name in names)
    assert "Self CPU" in (folder / "profile" / "rank-00000.txt").read_text()


def test_rows_of_steps_that_were_slowed_by_the_profiler_say_so(run: tuple[Path, RunConfig]) -> None:
    """Two steps, and the one before them, in which the profiler warms up."""
    folder, _ = run
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows if row["profiled"]] == [3, 4, 5]


def most_memory(layout: Layout) -> tuple[int, int]:
    """This rank's own memory at its most, and what is told; the second rank has held 200 MB more."""
    if layout.rank == 1:
        torch.ones(50_000_000)
    own = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return own, peak_memory_bytes(layout.device)


def test_memory_is_of_the_rank_that_has_held_most() -> None:
    (first, told), (second, told_there) = run_ranks(2, most_memory, pipeline=2)
    assert second > first + 100e6
    assert told == told_there >= second


DELAY_S = 0.2


def train_with_a_slow_last_stage(layout: Layout, config: RunConfig) -> None:
    forward = FinalNorm.forward  # which is of the last stage

    def slow(*given: Any) -> Any:
        time.sleep(DELAY_S)
        return forward(*given)

    FinalNorm.forward = slow  # type: ignore[method-assign]
    train(config, layout)


def test_a_stage_that_waits_for_another_says_so(tmp_path: Path) -> None:
    """Four times a step; what the first stage does meanwhile takes less than three of them."""
    training = {"steps": 2, "micro_batch_size": 2, "eval_steps": 0}
    config = toy_config(tmp_path, parallel={"pipeline": 2}, training=training)
    run_ranks(2, train_with_a_slow_last_stage, config, pipeline=2)
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert len(rows) == 2
    for row in rows:
        assert DELAY_S <= row["pipeline_time_s"] < row["step_time_s"]
        assert not row["profiled"]


def test_a_clock_that_is_restarted_forgets() -> None:
    clock = StepClock(5, torch.device("cpu"))
    assert list(clock.waiting(iter("ab"))) == ["a", "b"]
    clock.restart(7)
    assert clock.take(9).keys() == {"step_time_s"}
    assert list(clock.waiting(iter("ab"))) == ["a", "b"]
    times = clock.take(10)
    assert times.keys() == {"step_time_s", "data_time_s"}
    assert 0 < times["data_time_s"] < times["step_time_s"]
