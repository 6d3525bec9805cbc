"""What a run leaves behind: metrics rows, the finished record, Weights & Biases and TensorBoard files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_tokenformer.config.load import load_config
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.config.sizes import flops_per_token, parameter_count
from megatron_tokenformer.metrics_file import drop_rows_after, read_rows
from tests.ranks import run_ranks
from tests.toy import toy_config, train_toy


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunConfig]:
    folder = tmp_path_factory.mktemp("metrics")
    config = toy_config(
        folder,
        logging={"wandb": {"mode": "offline"}, "tensorboard": True},
        training={"eval_interval": 4, "log_interval": 2},
    )
    run_ranks(1, train_toy, config)
    return folder / "run", config


def test_rows_have_the_promised_keys_and_add_up(finished: tuple[Path, RunConfig]) -> None:
    folder, config = finished
    rows = read_rows(folder / "metrics.jsonl")
    training = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "val_loss" in row]
    assert [row["step"] for row in training] == [2, 4, 6, 8, 10]
    assert [row["step"] for row in evaluations] == [0, 4, 8, 10]
    keys = {"step", "tokens", "loss", "lr", "grad_norm", "step_time_s", "tokens_per_s", "flops"}
    assert all(keys <= row.keys() for row in training)
    assert all("mfu" not in row for row in training), "no peak is known of this device, so no MFU"
    assert training[-1]["tokens"] == 10 * 8 * 32
    assert training[-1]["flops"] == training[-1]["tokens"] * flops_per_token(config.model, 32)
    assert rows[-1]["val_loss"] < rows[0]["val_loss"]


def test_the_finished_record_and_the_resolved_config_are_there(finished: tuple[Path, RunConfig]) -> None:
    folder, config = finished
    record = json.loads((folder / "finished.json").read_text())
    assert record["step"] == 10
    assert record["parameters"] == parameter_count(config.model)
    assert Path(record["checkpoint"]).name == "step-00000010"
    assert load_config(folder / "config.yaml") == config


def test_wandb_works_offline_and_tensorboard_has_the_losses(finished: tuple[Path, RunConfig]) -> None:
    folder, _ = finished
    (run,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    assert run.stat().st_size > 0
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    logged = [event.value for event in events.Scalars("loss")]
    rows = [row["loss"] for row in read_rows(folder / "metrics.jsonl") if "loss" in row]
    assert logged == pytest.approx(rows)


def test_rows_of_steps_that_are_done_again_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(6)) + '{"step": 6, "lo')
    drop_rows_after(path, 3)
    assert [row["step"] for row in read_rows(path)] == [0, 1, 2, 3]


def test_a_damaged_line_costs_no_other_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"step": step}) + "\n" for step in range(6)]
    damaged = ['{"step": 2, "lo\0\0\n', "[2]\n", '{"loss": 3}\n']
    path.write_text("".join([*rows[:3], *damaged, *rows[3:], '{"step": 6}']))
    read = [row.get("step") for row in read_rows(path)]
    assert read == [0, 1, 2, None, 3, 4, 5], "the last has no end of line"
    assert drop_rows_after(path, 6) == 5
    assert path.read_text() == "".join([*rows[:3], *damaged, *rows[3:]]), "only what was cut short goes"
    assert drop_rows_after(path, 4) == 5
    assert path.read_text() == "".join([*rows[:3], *damaged, *rows[3:5]]), "and the rows of later steps"
    assert drop_rows_after(path, 1) == 4
    assert path.read_text() == "".join(rows[:2])


def test_a_last_line_that_is_damaged_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnothing\n\0\0\n')
    assert drop_rows_after(path, 9) == 1
    assert path.read_text() == '{"step": 1}\nnothing\n'
