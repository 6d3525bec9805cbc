"""The stage machine with the real trainer: stages, growth and launchers; killed in the middle, it goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron_tokenformer.metrics_file import read_rows
from tests.toy import write_tokens


def schedule(folder: Path, name: str) -> Path:
    """A schedule of two tiny stages on two processes, in `folder/name`."""
    prefix = write_tokens(folder)
    path = folder / f"{name}.yaml"
    tree = {
        "run_dir": str(folder / name),
        "launch": {"processes_per_node": 2},
        "common": {
            "model": {"layers": 2, "hidden_size": 32, "attention_heads": 4, "vocab_size": 64},
            "data": {"train": prefix, "validation": prefix, "sequence_length": 32},
            "optimizer": {"lr": 3e-3, "min_lr": 3e-4},
            "training": {
                "steps": 12,
                "global_batch_size": 8,
                "micro_batch_size": 2,
                "precision": "fp32",
                "eval_steps": 2,
                "log_interval": 1,
            },
            "checkpoint": {"interval": 3},
        },
        "stages": [
            {"name": "a", "config": {"model": {"tokens": {"qkv": 16, "output": 16, "ffn": 32}}}},
            {
                "name": "b",
                "config": {
                    "model": {"tokens": {"qkv": 32, "output": 32, "ffn": 64}},
                    "parallel": {"tensor": 2},
                },
            },
        ],
    }
    path.write_text(yaml.safe_dump(tree))
    return path


def start(path: Path, launcher: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "megatron_tokenformer.progressive", "--config", str(path)]
    return subprocess.Popen(
        [*command, "--launcher", launcher], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def losses(folder: Path) -> list[list[tuple[int, float | None, float | None]]]:
    return [
        [
            (row["step"], row.get("loss"), row.get("val_loss"))
            for row in read_rows(folder / stage / "metrics.jsonl")
        ]
        for stage in ("a", "b")
    ]


@pytest.mark.long
def test_a_schedule_that_was_killed_ends_as_one_that_was_not(tmp_path: Path) -> None:
    straight = start(schedule(tmp_path, "straight"), "deepspeed")
    said, _ = straight.communicate(timeout=300)
    assert straight.returncode == 0, said
    first, second = losses(tmp_path / "straight")
    assert second[0][2] == pytest.approx(first[-1][2], rel=1e-6), "growth keeps the validation loss"
    report = (tmp_path / "straight/report.md").read_text()
    assert f"{first[-1][2]:.4f}" in report
    assert (tmp_path / "straight/loss_vs_flops.png").stat().st_size > 10_000

    path = schedule(tmp_path, "killed")
    machine = start(path, "local")
    metrics = tmp_path / "killed/b/metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and any(row["step"] >= 4 for row in read_rows(metrics))):
        assert machine.poll() is None and time.monotonic() < deadline, machine.communicate()[0]
        time.sleep(0.02)
    os.kill(machine.pid, signal.SIGKILL)
    machine.communicate()
    again = start(path, "local")
    said, _ = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert "stage a: train" not in said, "what is done is not done again"
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    journal = json.loads((tmp_path / "killed/journal.json").read_text())
    assert {step["status"] for stage in journal["stages"].values() for step in stage.values()} == {"done"}
