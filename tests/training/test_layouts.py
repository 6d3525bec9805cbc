"""Every layout trains the same model: ten-step losses within 1e-5 of one process, in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_tokenformer.metrics_file import read_rows
from tests.ranks import run_ranks
from tests.toy import DENSE, toy_config, train_toy, write_tokens


def run(
    folder: Path, name: str, world_size: int, parallel: dict[str, Any], model: Any = None, **training: Any
) -> list[dict]:
    """Train the toy run on this layout; return its metrics rows."""
    # AdamW takes steps of full size from gradients that are nothing but rounding: with its usual eps of 1e-8,
    # one element of four layers, its gradient 1e-8 beside 4e-3, moves the norms by 3e-5.
    optimizer = {"eps": 1e-5}
    model = {"layers": 4, **(model or {})}
    config = toy_config(folder, model=model, parallel=parallel, optimizer=optimizer, training=training)
    config = config.model_copy(update={"run_dir": str(folder / name)})
    run_ranks(world_size, train_toy, config, **parallel)
    return read_rows(Path(config.run_dir) / "metrics.jsonl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("layouts")
    write_tokens(path)
    return path


@pytest.fixture(scope="module")
def one_process(folder: Path) -> list[dict]:
    return run(folder, "one", 1, {}, micro_batch_size=2)


LAYOUTS = [  # tensor, pipeline, data, sequence, micro-batch (accumulation is 8 / data / micro-batch)
    (1, 1, 2, False, 4),
    (1, 1, 2, False, 1),
    (1, 1, 4, False, 2),
    (2, 1, 1, False, 8),
    (2, 1, 1, True, 2),
    (2, 1, 2, False, 1),
    (2, 1, 2, True, 4),
    (4, 1, 1, False, 2),
    (4, 1, 1, True, 8),
    (1, 2, 1, False, 2),
    (1, 2, 2, False, 1),
    (2, 2, 1, False, 8),
    (2, 2, 1, True, 2),
    (1, 4, 1, False, 2),  # four stages of four layers: two have neither embedding nor loss
    (1, 4, 1, False, 1),
]


@pytest.mark.parametrize("tensor, pipeline, data, sequence, micro_batch_size", LAYOUTS)
def test_losses_and_norms_equal_one_process(
    folder: Path,
    one_process: list[dict],
    tensor: int,
    pipeline: int,
    data: int,
    sequence: bool,
    micro_batch_size: int,
) -> None:
    parallel = {"tensor": tensor, "pipeline": pipeline, "sequence": sequence}
    name = f"{tensor}-{pipeline}-{data}-{sequence}-{micro_batch_size}"
    rows = run(folder, name, tensor * pipeline * data, parallel, micro_batch_size=micro_batch_size)
    assert_equal(rows, one_process)


@pytest.fixture(scope="module")
def dense_process(folder: Path) -> list[dict]:
    return run(folder, "dense", 1, {}, DENSE, micro_batch_size=2)


@pytest.mark.parametrize(
    "world_size, parallel, recompute",
    [
        (2, {}, "none"),
        (2, {"tensor": 2}, "none"),
        (4, {"tensor": 4, "sequence": True}, "none"),
        (2, {"pipeline": 2}, "layer"),
        (8, {"tensor": 2, "pipeline": 2, "sequence": True}, "layer"),
    ],
)
def test_the_dense_twin_equals_one_process_too(
    folder: Path, dense_process: list[dict], world_size: int, parallel: dict[str, Any], recompute: str
) -> None:
    name = f"dense {world_size} {parallel}"
    rows = run(folder, name, world_size, parallel, DENSE, micro_batch_size=2, recompute=recompute)
    assert_equal(rows, dense_process)


def assert_equal(rows: list[dict], one_process: list[dict]) -> None:
    """Losses and norms of each step, within 1e-5."""
    assert len(rows) == len(one_process) == 12  # ten steps, and an evaluation at either end
    for here, reference in zip(rows, one_process):
        assert here["step"] == reference["step"]
        for key in ("loss", "val_loss", "grad_norm"):
            assert here.get(key) == pytest.approx(reference.get(key), abs=1e-5), (key, here["step"])
