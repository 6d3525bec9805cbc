"""fp16 with DeepSpeed's loss scaler: close to fp32 on every layout, and bit-identical when resumed.

DeepSpeed refuses fp16 off the GPU, although torch computes it there.  So that this path is tested without a
GPU, the ranks of these tests tell DeepSpeed (and our own check, which asks DeepSpeed) that it is supported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from deepspeed.accelerator import get_accelerator

from megatron_tokenformer.checkpoint.manifest import Manifest, read_manifest
from megatron_tokenformer.checkpoint.store import find_checkpoint
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.metrics_file import read_rows
from megatron_tokenformer.parallel.layout import Layout
from megatron_tokenformer.training.loop import train
from tests.ranks import run_ranks
from tests.toy import toy_config

LAYOUTS = {  # processes, layout
    "1": (1, {}),
    "tensor 2": (2, {"tensor": 2, "sequence": True}),
    "pipeline 2": (2, {"pipeline": 2}),
    "data 2": (2, {}),
}


def train_in_fp16(layout: Layout, config: RunConfig) -> None:
    """Train on this rank, which says of its processor what DeepSpeed does not believe."""
    get_accelerator().is_fp16_supported = lambda: True
    train(config, layout)


def run(folder: Path, name: str, layout: str, precision: str = "fp16", **training: Any) -> list[dict]:
    """Train (or go on training) the toy; return its metrics rows."""
    world_size, parallel = LAYOUTS[layout]
    config = toy_config(
        folder,
        parallel=parallel,
        optimizer={"schedule": "constant"},
        training={"micro_batch_size": 2, "precision": precision, **training},
    )
    config = config.model_copy(update={"run_dir": str(folder / name)})
    run_ranks(world_size, train_in_fp16, config, **parallel)
    return read_rows(folder / name / "metrics.jsonl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fp16")


@pytest.fixture(scope="module")
def fp32(folder: Path) -> list[dict]:
    return run(folder, "fp32", "1", "fp32")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_follow_fp32(folder: Path, fp32: list[dict], layout: str) -> None:
    rows = run(folder, layout, layout)
    assert len(rows) == len(fp32) == 12  # ten steps, and an evaluation at either end
    for here, reference in zip(rows, fp32):
        assert here["step"] == reference["step"]
        for key in ("loss", "val_loss"):
            assert here.get(key) == pytest.approx(reference.get(key), abs=1e-2), (key, here["step"])
    assert last_manifest(folder / layout).adam_step == 10, "no step was skipped for an overflow"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stop_and_resume_is_bit_identical_to_never_stopping(tmp_path: Path, layout: str) -> None:
    straight = run(tmp_path, "straight", layout, steps=8)
    run(tmp_path, "stopped", layout, steps=5)
    resumed = run(tmp_path, "stopped", layout, steps=8)
    assert steps(resumed) == steps(straight)
    assert resumed[-1]["val_loss"] == straight[-1]["val_loss"]
    ends = [last_manifest(tmp_path / name) for name in ("straight", "stopped")]
    assert ends[0].loss_scaler == ends[1].loss_scaler
    assert ends[0].loss_scaler["cur_iter"] == 8, "the scaler has counted every step"
    hashes = [[shard.hash for shard in end.shards] for end in ends]
    assert hashes[0] == hashes[1]


def steps(rows: list[dict]) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


def last_manifest(run_dir: Path) -> Manifest:
    return read_manifest(find_checkpoint(run_dir))
