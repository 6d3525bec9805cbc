"""Numbers gone wrong never reach the weights, under any layout, and are told with rank, step and samples."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from deepspeed.accelerator import get_accelerator

from megatron_tokenformer.checkpoint.manifest import read_manifest
from megatron_tokenformer.config.schema import RunConfig, Training
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.metrics_file import read_rows
from megatron_tokenformer.parallel.layout import Layout
from megatron_tokenformer.training import loop
from megatron_tokenformer.training.health import Verdict, judge
from megatron_tokenformer.training.loop import train
from megatron_tokenformer.training.run import Run
from tests.ranks import run_ranks
from tests.toy import toy_config, train_toy
from tests.training.injection import inject, train_injected, write_marked

LAYOUTS: dict[str, dict[str, Any]] = {"tensor 2": {"tensor": 2}, "pipeline 2": {"pipeline": 2}, "data 2": {}}
BATCH, MICRO_BATCH = 8, 2


def config_of(folder: Path, layout: str = "data 2", interval: int = 1, **training: Any) -> RunConfig:
    sizes = {"global_batch_size": BATCH, "micro_batch_size": MICRO_BATCH, "eval_steps": 0, "steps": 3}
    return toy_config(
        folder,
        parallel=LAYOUTS[layout],
        optimizer={"schedule": "constant", "warmup_steps": 0},
        training={**sizes, **training},
        checkpoint={"interval": interval, "keep_last": 10},
    )


def state(config: RunConfig, step: int) -> list[str]:
    """Hashes of all weights and moments after a step."""
    path = Path(config.run_dir) / "checkpoints" / f"step-{step:08d}"
    return [shard.hash for shard in read_manifest(path).shards]


def events(config: RunConfig) -> list[dict[str, Any]]:
    return [row for row in read_rows(Path(config.run_dir) / "metrics.jsonl") if "event" in row]


CASES = [
    *((kind, layout, "fp32") for kind in ("activations", "loss", "gradient") for layout in LAYOUTS),
    ("loss", "pipeline 2", "bf16"),
    ("activations", "data 2", "bf16"),
    ("gradient", "data 2", "bf16"),
]


@pytest.mark.parametrize("kind, layout, precision", CASES)
def test_a_step_that_is_not_finite_is_skipped_by_all(
    tmp_path: Path, layout: str, kind: str, precision: str
) -> None:
    write_marked(tmp_path, position=BATCH + 5)
    config = config_of(tmp_path, layout, precision=precision)
    run_ranks(2, train_injected, config, kind, **LAYOUTS[layout])
    assert state(config, 2) == state(config, 1), "weights and moments are what they were before the step"
    assert state(config, 3) != state(config, 2)
    # Micro-batches are 8-9, 10-11, 12-13, 14-15, those of two data ranks in turn; 13 is marked.  A gradient
    # goes back through the stages, and is of all that its rank had in the step.
    ranks: dict[str, list[int]] = {"tensor 2": [0, 1], "pipeline 2": [1], "data 2": [0]}
    samples = [[12, 13]]
    if kind == "gradient":
        ranks["pipeline 2"] = [0, 1]
        samples = [[8, 9], [12, 13]] if layout == "data 2" else [[8, 15]]
    expected = {"ranks": ranks[layout], "samples": samples}
    cause = "gradient" if kind == "gradient" else "loss"
    assert events(config) == [{"step": 2, "event": cause, "action": "skip", **expected}]
    rows = [row for row in read_rows(Path(config.run_dir) / "metrics.jsonl") if "loss" in row]
    assert [row["skipped_steps"] for row in rows] == [0, 1, 1]
    assert (rows[1]["loss"] is None) == (kind != "gradient")
    manifest = read_manifest(Path(config.run_dir) / "checkpoints/step-00000003")
    assert (manifest.position, manifest.adam_step) == (3 * BATCH, 2)


def words_of(layout: Layout, config: RunConfig, kind: str) -> str:
    inject(kind)
    with pytest.raises(UserError) as ended:
        train(config, layout)
    assert ended.value.exit_code == 1 and ended.value.everywhere
    return str(ended.value)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_the_policy_can_be_to_stop(tmp_path: Path, kind: str) -> None:
    write_marked(tmp_path, position=BATCH + 5)
    config = config_of(tmp_path, "pipeline 2", on_nonfinite="stop")
    where = " on rank 1 (samples 12-13)" if kind == "loss" else " on ranks 0-1 (samples 8-15)"
    for words in run_ranks(2, words_of, config, kind, pipeline=2):
        assert words.startswith(f"step 2: the {kind} is not finite{where}; ")
        assert "training.on_nonfinite=skip would go on" in words
    assert not (Path(config.run_dir) / "checkpoints/step-00000002").exists()


def break_every_loss(layout: Layout, config: RunConfig) -> str:
    from megatron_tokenformer.training import engine

    loss_of = engine.language_model_loss
    engine.language_model_loss = lambda *given: loss_of(*given) + float("nan")
    with pytest.raises(UserError) as ended:
        train(config, layout)
    return str(ended.value)


def test_many_skipped_steps_in_a_row_end_the_run_across_restarts(tmp_path: Path) -> None:
    config = config_of(tmp_path, steps=2, max_skipped_steps=3)
    run_ranks(2, train_skipping, config)
    more = config.model_copy(update={"training": config.training.model_copy(update={"steps": 9})})
    for words in run_ranks(2, break_every_loss, more):
        assert words.startswith("step 3: the loss is not finite on ranks 0-1 (samples 16-23)")
        assert "3 steps in a row have changed nothing (training.max_skipped_steps=3)" in words


def train_skipping(layout: Layout, config: RunConfig) -> None:
    from megatron_tokenformer.training import engine

    loss_of = engine.language_model_loss
    engine.language_model_loss = lambda *given: loss_of(*given) + float("nan")
    train(config, layout)


def overflow_at_first(layout: Layout, config: RunConfig) -> list[float]:
    """Train in fp16 from a loss scale that is far too large; return what it was after each step."""
    get_accelerator().is_fp16_supported = lambda: True
    inject("loss")
    step = loop.train_step
    scales: list[float] = []

    def watched(run: Run, batches: Any) -> Any:
        scaler: Any = run.engine.deepspeed.optimizer.loss_scaler
        if run.progress.step == 0:
            scaler.cur_scale, scaler.cur_hysteresis = 2.0**40, 1
        loss = step(run, batches)
        scales.append(scaler.cur_scale)
        return loss

    loop.train_step = watched
    train(config, layout)
    return scales


def test_the_search_for_the_loss_scale_of_fp16_is_no_setback(tmp_path: Path) -> None:
    write_marked(tmp_path, position=27 * BATCH)
    config = config_of(tmp_path, interval=0, precision="fp16", steps=30, max_skipped_steps=2)
    (scales,) = run_ranks(1, overflow_at_first, config)
    lowered = [after < before for before, after in zip([2.0**40, *scales], scales)]
    assert all(lowered[:5]) and sum(lowered) < 27, "it fell until it fitted"
    assert not lowered[27], "a loss that is not finite says nothing of the scale"
    assert [(row["step"], row["event"]) for row in events(config)] == [(28, "loss")]
    manifest = read_manifest(Path(config.run_dir) / "checkpoints/step-00000030")
    assert manifest.adam_step == 30 - sum(lowered) - 1
    assert manifest.setbacks["skipped"] == sum(lowered) + 1


SPIKES = {"steps": 9, "spike_window": 8}
SPIKE_AT = 5 * BATCH + 5  # in step 6


@pytest.mark.parametrize("layout, policy", [("tensor 2", "log"), ("pipeline 2", "skip")])
def test_a_spike_is_told_and_left_out_if_so_asked(tmp_path: Path, layout: str, policy: str) -> None:
    write_marked(tmp_path, SPIKE_AT)
    config = config_of(tmp_path, layout, on_spike=policy, **SPIKES)
    run_ranks(2, train_injected, config, "spike", **LAYOUTS[layout])
    row = {"step": 6, "event": "spike", "action": policy, "ranks": [], "samples": [[40, 47]]}
    assert events(config) == [row]
    assert (state(config, 6) == state(config, 5)) == (policy == "skip")


@pytest.mark.parametrize("layout, precision", [("data 2", "fp32"), ("tensor 2", "bf16")])
def test_a_rollback_goes_on_from_the_checkpoint_behind_the_bad_batch(
    tmp_path: Path, layout: str, precision: str
) -> None:
    """As a run whose checkpoint is told by hand to go on from there; and a resumed run goes the same way."""
    write_marked(tmp_path, SPIKE_AT)
    split = LAYOUTS[layout]
    config = config_of(tmp_path, layout, interval=4, on_spike="rollback", precision=precision, **SPIKES)
    run_ranks(2, train_injected, config, "spike", **split)
    told = {"step": 4, "event": "spike", "action": "rollback", "ranks": [], "samples": [[40, 47]]}
    assert events(config) == [{**told, "spike_step": 6, "left_out": [4 * BATCH, 6 * BATCH - 1]}]
    rows = read_rows(Path(config.run_dir) / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 10))
    assert [row["tokens"] for row in rows if "loss" in row] == [step * BATCH * 32 for step in range(1, 10)]

    by_hand = config.model_copy(update={"run_dir": str(tmp_path / "by hand")})
    shorter = by_hand.model_copy(update={"training": by_hand.training.model_copy(update={"steps": 4})})
    run_ranks(2, train_toy, shorter, **split)
    path = tmp_path / "by hand/checkpoints/step-00000004/manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["position"] == 4 * BATCH
    path.write_text(json.dumps(manifest | {"position": 6 * BATCH}))
    run_ranks(2, train_toy, by_hand, **split)
    assert state(config, 9) == state(by_hand, 9)

    resumed = config.model_copy(update={"run_dir": str(tmp_path / "resumed")})
    shutil.copytree(config.run_dir, resumed.run_dir)
    for step in (8, 9):
        shutil.rmtree(Path(resumed.run_dir) / f"checkpoints/step-{step:08d}")
    run_ranks(2, train_injected, resumed, "spike", **split)
    assert state(resumed, 9) == state(config, 9)
    assert events(resumed) == events(config)
    assert read_manifest(Path(resumed.run_dir) / "checkpoints/step-00000009").setbacks["rollbacks"] == 1


def test_without_a_checkpoint_a_rollback_is_a_skip_and_too_many_end_the_run(tmp_path: Path) -> None:
    write_marked(tmp_path, SPIKE_AT)
    config = config_of(tmp_path, interval=0, on_spike="rollback", **SPIKES)
    run_ranks(1, train_injected, config, "spike")
    assert [row["action"] for row in events(config)] == ["skip"]
    config = config_of(tmp_path, interval=4, on_spike="rollback", max_rollbacks=0, **SPIKES)
    (words,) = run_ranks(1, words_of, config.model_copy(update={"run_dir": str(tmp_path / "none")}), "spike")
    assert "the run has gone back 0 times already (training.max_rollbacks=0)" in words


def test_what_a_spike_is() -> None:
    training = Training(spike_factor=2.0, spike_window=4, on_spike="skip")
    assert judge(9.0, [1.0], training) == Verdict(None, 9.0), "half a window is needed"
    assert judge(2.0, [1.0, 1.0, 5.0], training) == Verdict(None, 2.0, 1.0)
    assert judge(2.1, [1.0, 1.0, 5.0], training) == Verdict("spike", 2.1, 1.0, changed=False)
    assert judge(None, [1.0], training) == Verdict("loss", None, None, changed=False)
    logged = Training(spike_factor=2.0, spike_window=4)
    assert judge(2.1, [1.0, 1.0], logged) == Verdict("spike", 2.1, 1.0, changed=True)
