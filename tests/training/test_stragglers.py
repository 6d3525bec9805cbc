"""Slow ranks are found among their peers, and named."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.metrics_file import read_rows
from megatron_tokenformer.model.ends import Embedding
from megatron_tokenformer.parallel.layout import Layout
from megatron_tokenformer.training.loop import train
from megatron_tokenformer.training.stragglers import find_stragglers
from tests.ranks import run_ranks
from tests.toy import toy_config


def test_peers_are_the_ranks_of_a_stage_or_all_where_stages_are_single() -> None:
    own = [1.0, 1.1, 3.0, 3.2]  # two stages of two ranks, of which the second has more to do
    assert find_stragglers(own, [[0, 1], [2, 3]], 5.0, 2.0) == {}
    assert find_stragglers(own, [[0], [1], [2], [3]], 5.0, 2.0) == {2: 1.1, 3: 1.1}
    assert find_stragglers([1.0, 2.5], [[0, 1]], 5.0, 2.0) == {1: 1.0}
    assert find_stragglers([1.0, 2.5], [[0, 1]], 5.0, 3.0) == {}


def test_what_is_nothing_beside_a_step_is_no_straggler() -> None:
    assert find_stragglers([0.001, 0.01], [[0, 1]], 1.0, 2.0) == {}
    assert find_stragglers([0.001, 0.1], [[0, 1]], 1.0, 2.0) == {1: 0.001}


def train_with_a_slow_rank(layout: Layout, config: RunConfig) -> None:
    forward = Embedding.forward

    def slow(*given: Any) -> Any:
        time.sleep(0.3)
        return forward(*given)

    if layout.rank == 1:
        Embedding.forward = slow  # type: ignore[method-assign]
    train(config, layout)


def test_a_slow_rank_of_a_run_is_named(tmp_path: Path) -> None:
    config = toy_config(tmp_path, training={"micro_batch_size": 4, "steps": 3, "eval_steps": 0})
    run_ranks(2, train_with_a_slow_rank, config)
    rows = [row for row in read_rows(tmp_path / "run/metrics.jsonl") if "loss" in row]
    slow = [row for row in rows if row.get("straggler") == 1]
    assert slow and all(row["straggler_time_s"] >= 0.3 for row in slow)
