"""Tasks inside a run: the figures of tools/evaluate.py on the same checkpoints, and no harm if they fail."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_tokenformer.commands.evaluate import main
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.metrics_file import read_rows
from megatron_tokenformer.parallel.layout import Layout
from megatron_tokenformer.training import loop, task_scores
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


def with_tasks(plain: RunConfig, tasks: list[str], run_dir: Path) -> RunConfig:
    """The same run, with tasks and a folder of its own."""
    tree = plain.model_dump(mode="json")
    tree["evaluation"]["tasks"], tree["run_dir"] = tasks, str(run_dir)
    return RunConfig.model_validate(tree)


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}])
def test_tasks_at_intervals_have_the_figures_of_the_checkpoints(
    tmp_path: Path, layout: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    config = train_with_tasks(tmp_path, TASKS, layout, num_fewshot=1)
    rows = [row for row in read_rows(Path(config.run_dir) / "metrics.jsonl") if "toy_choice/acc" in row]
    assert [row["step"] for row in rows] == [3, 6]
    assert rows[0] != {**rows[1], "step": 3, "tokens": rows[0]["tokens"]}, "the model has learned meanwhile"
    for row in rows:
        path = Path(config.run_dir) / "checkpoints" / f"step-{row['step']:08d}"
        words = ["--load", str(path), "--tasks", ",".join(TASKS), "--include-path", str(tmp_path / "own")]
        # Examples are drawn anew, so that the second evaluation has those of the first.
        assert main([*words, "--num-fewshot", "1", "--json"]) == 0
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
    config = with_tasks(plain, ["toy_choice"], tmp_path / "run")
    run_ranks(2, train_short_of_luck, config, rank, tensor=2)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    events = [row for row in rows if "event" in row]
    assert [(row["step"], row["event"]) for row in events] == [
        (step, "tasks not evaluated") for step in (3, 6)
    ]
    assert all("the whole model does not fit" in row["why"] for row in events)
    assert losses(config) == losses(plain), "training went on as if nothing had been"


def test_a_task_that_fails_on_the_main_rank_ends_no_run(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    write_tasks(folder)
    functions = folder / "functions.py"
    later = 'doc["after" if doc["before"][0] != "x " else "gone"]'  # when the harness has tried the first
    functions.write_text(functions.read_text().replace('doc["after"]', later))
    wanted = {"tasks": ["toy_grande"], "include_path": str(folder)}
    config = train_on_text(tmp_path, TEXT, tensor=2, evaluation=wanted)
    *_, last = read_rows(Path(config.run_dir) / "metrics.jsonl")
    assert (last["step"], last["event"]) == (4, "tasks not evaluated")
    assert "KeyError: 'gone'" in last["why"]
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


def prepare(layout: Layout, config: RunConfig) -> tuple[bool, str, int]:
    """On this rank, for `run_ranks`: whether all end with an error at the start, the words and the code."""
    with pytest.raises(UserError) as refused:
        task_scores.prepare_tasks(config, None, layout)
    return refused.value.everywhere, str(refused.value), refused.value.exit_code


@pytest.mark.parametrize(
    "task, told, code",
    [
        ("no_such_task", "no task no_such_task in lm-evaluation-harness or ", 2),
        ("toy_choice", "task toy_choice cannot be loaded: ", 1),
    ],
)
def test_names_and_documents_that_are_not_there_are_refused_at_the_start(
    tmp_path: Path, task: str, told: str, code: int
) -> None:
    folder = write_tasks(tmp_path / "own")
    (tmp_path / "own" / "toy_choice.jsonl").unlink()
    wanted = {"tasks": ["toy_write", task], "include_path": folder}
    data = {"tokenizer": {"type": "ByteTokenizer"}}
    config = toy_config(tmp_path, model={"vocab_size": 260}, data=data, evaluation=wanted)
    first, second = run_ranks(2, prepare, config)
    assert first == second
    everywhere, words, found = first
    assert everywhere and words.startswith(told) and found == code


def train_cut_off(layout: Layout, config: RunConfig) -> None:
    """On this rank, for `run_ranks`: from the first step on, tasks and documents are out of reach."""
    take_steps = loop.train_steps

    def cut_off(*given: Any) -> str | None:
        if layout.is_main:
            shutil.rmtree(str(config.evaluation.include_path))
        return take_steps(*given)

    loop.train_steps = cut_off
    train(config, layout)


def test_evaluations_need_nothing_that_was_there_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    config = with_tasks(train_with_tasks(tmp_path / "plain", [], {}), TASKS, tmp_path / "run")
    run_ranks(1, train_cut_off, config)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if "toy_choice/acc" in row] == [3, 6]


def imports_the_harness(layout: Layout, config: RunConfig) -> bool:
    """On this rank, for `run_ranks`: whether a run does."""
    train(config, layout)
    return "lm_eval" in sys.modules


def test_a_run_without_tasks_does_not_import_the_harness(tmp_path: Path) -> None:
    assert run_ranks(1, imports_the_harness, toy_config(tmp_path)) == [False]


@pytest.mark.parametrize("saved, fits", [(4, 8), (0, 0)])
def test_tasks_fall_on_checkpoints(tmp_path: Path, saved: int, fits: int) -> None:
    with pytest.raises(UserError, match=rf"evaluation\.interval={fits} would work"):
        toy_config(tmp_path, evaluation={"tasks": ["a"], "interval": 6}, checkpoint={"interval": saved})
