"""Checkpoints of a dense model: other layouts go on from them, they are evaluated, and get no tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_tokenformer.checkpoint.manifest import read_manifest
from megatron_tokenformer.checkpoint.shrink import plan_shrink
from megatron_tokenformer.checkpoint.store import find_checkpoint
from megatron_tokenformer.config.growth import Growth, Shrinking
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.evaluation.perplexity import evaluate, open_evaluation
from megatron_tokenformer.metrics_file import read_rows
from megatron_tokenformer.training.run import find_restore_point
from tests.checkpoint.growing import grow
from tests.ranks import run_ranks
from tests.toy import DENSE, toy_config, train_toy, write_tokens
from tools import grow_checkpoint, inspect_checkpoint

WINDOWS = 16


def train(
    folder: Path, name: str, steps: int, world_size: int, load: Path | None = None, **parallel: Any
) -> RunConfig:
    """Train (or go on) to so many steps of one schedule; the validation is over all of its data."""
    validation = write_tokens(folder, "validation", tokens=WINDOWS * 32 + 1, seed=1)
    config = toy_config(
        folder,
        model=DENSE,
        data={"validation": validation},
        parallel=parallel,
        optimizer={"schedule": "constant", "eps": 1e-5},  # see tests/training/test_layouts.py
        training={"steps": steps, "micro_batch_size": 2},
        checkpoint={"load": str(load) if load else None},
    ).model_copy(update={"run_dir": str(folder / name)})
    run_ranks(world_size, train_toy, config, **parallel)
    return config


def rows(config: RunConfig, key: str) -> list[tuple[int, float]]:
    found = read_rows(Path(config.run_dir) / "metrics.jsonl")
    return [(row["step"], row[key]) for row in found if key in row]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Five steps by tensor 2 with the sequence split, on two data ranks."""
    return train(tmp_path_factory.mktemp("dense"), "stopped", 5, 4, tensor=2, sequence=True)


def test_other_layouts_go_on_as_one_process_that_never_stopped(stopped: RunConfig) -> None:
    folder = Path(stopped.run_dir).parent
    straight = train(folder, "straight", 8, 1)
    for world_size, parallel in ((1, {}), (2, {"pipeline": 2}), (4, {"tensor": 4})):
        config = train(folder, f"on {parallel}", 8, world_size, Path(stopped.run_dir), **parallel)
        for key in ("loss", "grad_norm", "val_loss"):
            here, expected = rows(config, key), rows(straight, key)[-len(rows(config, key)) :]
            assert [step for step, _ in here] == [step for step, _ in expected]
            assert [x for _, x in here] == pytest.approx([x for _, x in expected], abs=1e-5), key
        assert [step for step, _ in rows(config, "loss")] == [6, 7, 8]


def test_it_is_evaluated_as_its_run_did(stopped: RunConfig) -> None:
    ((_, own),) = [row for row in rows(stopped, "val_loss") if row[0] == 5]
    (score,) = evaluate(open_evaluation(stopped.run_dir, [prefix for _, prefix in stopped.data.validation]))
    assert (score.val_loss, score.tokens) == (pytest.approx(own, rel=1e-6), WINDOWS * 32)


def test_it_says_what_it_is(stopped: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = read_manifest(find_checkpoint(stopped.run_dir))
    assert manifest.taus == {}
    assert not {"tokens", "score_norm"} & manifest.config["model"].keys()
    assert manifest.shapes["layers.1.mlp.down.weight"] == [4 * 32, 32]
    assert inspect_checkpoint.main([str(find_checkpoint(stopped.run_dir)), "--verify"]) == 0
    said = capsys.readouterr().out
    assert "architecture transformer" in said and "tau        none" in said


def test_it_has_no_tokens_to_grow_or_shrink_in(stopped: RunConfig, tmp_path: Path) -> None:
    path = find_checkpoint(stopped.run_dir)
    words = "is for parameter tokens, and model.architecture=transformer has none"
    with pytest.raises(UserError, match=f"growth {words}"):
        grow(path, toy_config(tmp_path), tmp_path / "grown", Growth())
    with pytest.raises(UserError, match=f"shrinking {words}"):
        plan_shrink(path, toy_config(tmp_path), tmp_path / "shrunk", Shrinking())
    for size in (["--tokens", "qkv=32"], ["--target-params", "1M"]):
        with pytest.raises(UserError, match=f"growth {words}"):
            grow_checkpoint.main(["--load", str(path), "--save", str(tmp_path / "grown"), *size])
    assert not (tmp_path / "grown").exists()


def test_a_tokenformer_does_not_go_on_from_it(stopped: RunConfig, tmp_path: Path) -> None:
    config = toy_config(tmp_path, checkpoint={"load": stopped.run_dir})
    with pytest.raises(
        UserError, match=r"made with model.architecture=transformer, the config has tokenformer"
    ):
        find_restore_point(config, None)
