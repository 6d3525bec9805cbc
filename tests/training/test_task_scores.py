"""Tasks inside a run: the figures of tools/evaluate.py on the same checkpoints, and no harm if they fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_tokenformer.commands.evaluate import main
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.metrics_file import read_rows
from megatron_tokenformer.parallel.layout import Layout
from megatron_tokenformer.training import task_scores
from megatron_tokenformer.training.loop import train
from tests.evaluation.models import train_on_text
from tests.evaluation.tasks import write_tasks
from tests.ranks import run_ranks
from tests.toy import toy_config

TEXT = "the cat sat on the mat. " * 60
TASKS = ["toy_choice", "toy_lambada", "toy_write"]


def train_with_tasks(folder: Path, tasks: list[str], layout: dict[str, int], **more: Any) -> RunConfig:
    """Six steps, with tasks after the third and the last."""
    wanted = {"tasks": tasks, "interval": 3, "include_path": str(folder / "own"), **more}
    write_tasks(folder / "own")
    sections: dict[str, Any] = {"evaluation": wanted, "checkpoint": {"interval": 3}, "training": {"steps": 6}}
    return train_on_text(folder, TEXT, **layout, **sections)


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}])
def test_tasks_at_intervals_have_the_figures_of_the_checkpoints(
    tmp_path: Path, layout: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    config = train_with_tasks(tmp_path, TASKS, layout)
    rows = [row for row in read_rows(Path(config.run_dir) / "metrics.jsonl") if "toy_choice/acc" in row]
    assert [row["step"] for row in rows] == [3, 6]
    assert rows[0] != {**rows[1], "step": 3, "tokens": rows[0]["tokens"]}, "the model has learned meanwhile"
    for row in rows:
        path = Path(config.run_dir) / "checkpoints" / f"step-{row['step']:08d}"
        words = ["--load", str(path), "--tasks", ",".join(TASKS), "--include-path", str(tmp_path / "own")]
        assert main([*words, "--json"]) == 0
        told = json.loads(capsys.readouterr().out.splitlines()[-1])["tasks"]
        expected = {name: value for name, value in told.items() if "_stderr" not in name}
        assert {name: row[name] for name in row if "/" in name} == pytest.approx(expected, rel=1e-6)


def train_short_of_luck(layout: Layout, config: RunConfig, rank: int) -> None:
    """On this rank, for `run_ranks`: the model of this rank cannot be loaded for an evaluation."""
    if layout.rank == rank:

        def fail(*_: Any) -> None:
            raise UserError("the whole model does not fit", exit_code=1)

        from megatron_tokenformer.evaluation import zero_shot

        zero_shot.load_model = fail  # type: ignore[assignment]
    train(config, layout)


def losses(config: RunConfig) -> list[float]:
    return [row["loss"] for row in read_rows(Path(config.run_dir) / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_evaluate_ends_no_run(tmp_path: Path, rank: int) -> None:
    (tmp_path / "plain").mkdir()
    plain = train_with_tasks(tmp_path / "plain", [], {"tensor": 2})
    tree = plain.model_dump(mode="json")
    tree["evaluation"] |= {"tasks": ["toy_choice"]}
    tree["run_dir"] = str(tmp_path / "run")
    config = RunConfig.model_validate(tree)
    run_ranks(2, train_short_of_luck, config, rank, tensor=2)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    events = [row for row in rows if "event" in row]
    assert [(row["step"], row["event"]) for row in events] == [
        (step, "tasks not evaluated") for step in (3, 6)
    ]
    assert all("the whole model does not fit" in row["why"] for row in events)
    assert losses(config) == losses(plain), "training went on as if nothing had been"


FAILING = [("toy_choice", "cannot be loaded"), ("toy_grande", "KeyError: 'gone'")]


@pytest.mark.parametrize("task, why", FAILING)
def test_tasks_that_fail_on_the_main_rank_end_no_run(tmp_path: Path, task: str, why: str) -> None:
    folder = tmp_path / "own"
    write_tasks(folder)
    (folder / "toy_choice.jsonl").unlink()
    functions = folder / "functions.py"
    later = 'doc["after" if doc["before"][0] != "x " else "gone"]'  # when the harness has tried the first
    functions.write_text(functions.read_text().replace('doc["after"]', later))
    wanted = {"tasks": [task], "include_path": str(folder)}
    config = train_on_text(tmp_path, TEXT, tensor=2, evaluation=wanted)
    *_, last = read_rows(Path(config.run_dir) / "metrics.jsonl")
    assert (last["step"], last["event"]) == (4, "tasks not evaluated")
    assert why in last["why"]
    assert json.loads((Path(config.run_dir) / "finished.json").read_text())["step"] == 4


@pytest.mark.parametrize(
    "wanted, told",
    [
        ({"include_path": "nowhere"}, "evaluation.include_path=nowhere is no folder of tasks"),
        ({}, "evaluation.tasks need the tokenizer: nothing tells the tokenizer"),
    ],
)
def test_what_no_evaluation_could_do_is_refused_at_the_start(
    tmp_path: Path, wanted: dict[str, str], told: str
) -> None:
    config = toy_config(tmp_path, evaluation={"tasks": ["piqa"], **wanted})
    with pytest.raises(UserError, match=told):
        task_scores.check_tasks(config, None)


@pytest.mark.parametrize("saved, fits", [(4, 8), (0, 0)])
def test_tasks_fall_on_checkpoints(tmp_path: Path, saved: int, fits: int) -> None:
    with pytest.raises(UserError, match=rf"evaluation\.interval={fits} would work"):
        toy_config(tmp_path, evaluation={"tasks": ["a"], "interval": 6}, checkpoint={"interval": saved})
