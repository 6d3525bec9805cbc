"""A twenty-step run whose losses are in a file: what changes the numbers changes this file knowingly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_tokenformer.metrics_file import read_rows
from tests.ranks import run_ranks
from tests.toy import toy_config, train_toy

GOLDEN = Path(__file__).with_name("golden_losses.json")


def golden_run(folder: Path) -> list[float]:
    """Losses of twenty steps on two tensor-parallel ranks.

    `python -m tests.training.test_golden` writes the file anew, after a change meant to change numbers.
    """
    config = toy_config(folder, parallel={"tensor": 2}, training={"steps": 20, "micro_batch_size": 4})
    run_ranks(2, train_toy, config, tensor=2)
    return [row["loss"] for row in read_rows(folder / "run" / "metrics.jsonl") if "loss" in row]


def test_losses_are_the_golden_ones(tmp_path: Path) -> None:
    assert golden_run(tmp_path) == pytest.approx(json.loads(GOLDEN.read_text()), abs=1e-6)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text(json.dumps(golden_run(Path(folder)), indent=1) + "\n")
