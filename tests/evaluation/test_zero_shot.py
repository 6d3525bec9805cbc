"""Tasks of lm-evaluation-harness on local files, against the same figures computed one request at a time."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lm_eval.tasks._yaml_loader import load_yaml

from megatron_tokenformer.checkpoint.store import find_checkpoint
from megatron_tokenformer.commands import evaluate as commands
from megatron_tokenformer.commands.evaluate import main
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.data.tokenizers import ByteTokenizer
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.evaluation import harness, perplexity, scoring, zero_shot
from megatron_tokenformer.evaluation.load import checkpoint_tokenizer, open_checkpoint
from megatron_tokenformer.evaluation.scoring import Deadline, Scorer, Window
from megatron_tokenformer.evaluation.zero_shot import (
    TaskSettings,
    evaluate_tasks,
    figures,
    open_tasks,
    paper_columns,
)
from megatron_tokenformer.parallel.layout import Layout
from tests.evaluation.models import byte_model, plain_logits, train_on_text
from tests.evaluation.tasks import QUESTIONS, TASKS, Plain, write_tasks
from tests.ranks import run_ranks

NAMES = ",".join(TASKS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """By tensor 2 x pipeline 2."""
    text = "the cat sat on the mat. " * 60
    steps = {"steps": 12}
    return train_on_text(tmp_path_factory.mktemp("trained"), text, tensor=2, pipeline=2, training=steps)


@pytest.fixture(scope="module")
def plain(trained: RunConfig) -> Plain:
    return Plain(find_checkpoint(trained.run_dir))


@pytest.fixture(scope="module")
def folder(plain: Plain, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Tasks of which every other question is answered as the model will."""
    written = [plain.write(doc["question"], 6, ".") for doc in QUESTIONS]
    answers = [text if number % 2 else text + "x" for number, text in enumerate(written)]
    return write_tasks(tmp_path_factory.mktemp("tasks") / "own", answers)


def evaluate_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main([*words, "--json"]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return told


def without_errors(found: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in found.items() if "_stderr" not in name}


def test_every_kind_of_task_has_the_figures_of_the_plain_model(
    trained: RunConfig, plain: Plain, folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "all.json"
    words = ["--load", trained.run_dir, "--tasks", NAMES, "--include-path", folder, "--output", str(output)]
    told = evaluate_json(capsys, *words)
    expected = plain.figures()
    assert 0.0 < expected["toy_choice/acc"] < 1.0, "the task tells right from wrong"
    found = without_errors(told["tasks"])
    assert found.pop("toy_write/exact_match") == pytest.approx(0.5)
    assert found == pytest.approx(expected, rel=1e-5)
    assert told["tasks"]["toy_choice/acc_stderr"] > 0.0
    assert (told["step"], told["parameters"]) == (12, sum(p.numel() for p in plain.model.parameters()))
    whole = json.loads(output.read_text())
    assert whole["results"]["toy_choice"]["acc,none"] == found["toy_choice/acc"]
    assert whole["n-samples"]["toy_choice"]["original"] == 5


@pytest.mark.parametrize("size", ["1", "3", "auto"])
def test_the_batch_has_no_say(
    trained: RunConfig, plain: Plain, folder: str, size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--load", trained.run_dir, "--tasks", "toy_choice,toy_lambada", "--include-path", folder]
    found = evaluate_json(capsys, *words, "--batch-size", size)["tasks"]
    expected = {k: v for k, v in plain.figures().items() if k.startswith(("toy_choice", "toy_lambada"))}
    assert without_errors(found) == pytest.approx(expected, rel=1e-5)


def test_limit_takes_the_first_documents(
    trained: RunConfig, folder: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["--tasks", "toy_choice", "--include-path", folder, "--limit", "2"]
    output = tmp_path / "all.json"
    assert main(["--load", trained.run_dir, *words, "--output", str(output)]) == 0
    assert "note: of the first 2 documents" in capsys.readouterr().out
    assert json.loads(output.read_text())["n-samples"]["toy_choice"] == {"original": 5, "effective": 2}


def test_data_and_tasks_go_together(
    trained: RunConfig, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--load", trained.run_dir, "--data", trained.data.validation[0][1]]
    told = evaluate_json(capsys, *words, "--tasks", "toy_grande", "--include-path", folder)
    assert told["val_ppl"] > 1.0 and "toy_grande/acc" in told["tasks"]


def evaluate_here(
    layout: Layout, run_dir: str, folder: str, names: list[str]
) -> dict[str, float] | str | None:
    """On this rank, for `run_ranks`; the words of what went wrong."""
    stored = open_checkpoint(run_dir)
    settings = TaskSettings(tuple(names), folder, rows=2)
    try:
        tasks = open_tasks(settings, layout)
        results = evaluate_tasks(stored, checkpoint_tokenizer(stored), settings, tasks, layout=layout)
    except UserError as error:
        assert error.everywhere
        return str(error)
    return figures(results) if results is not None else None


def test_several_processes_find_what_one_does_and_end_together(trained: RunConfig, folder: str) -> None:
    stored = open_checkpoint(trained.run_dir)
    settings = TaskSettings(tuple(TASKS), folder)
    alone = evaluate_tasks(stored, checkpoint_tokenizer(stored), settings, open_tasks(settings))
    assert alone is not None
    first, *others = run_ranks(3, evaluate_here, trained.run_dir, folder, list(TASKS))
    assert others == [None, None]
    assert first == pytest.approx(figures(alone), rel=1e-6)
    told = set(run_ranks(3, evaluate_here, trained.run_dir, folder + "/none", ["toy_choice"]))
    assert told == {f"{folder}/none is no folder of tasks"}


def test_memory_that_is_too_little_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows = byte_model(), [Window([*range(n, 20)], [[n, 1], [2]]) for n in range(10)]
    scorer = Scorer(model, ByteTokenizer())
    expected, sizes = scorer.score(windows), []
    forward = type(model).hidden

    def little(self: Any, tokens: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        sizes.append(len(tokens))
        if tokens.numel() > 50:
            raise torch.OutOfMemoryError("no")
        return forward(self, tokens, *rest, **more)

    monkeypatch.setattr(type(model), "hidden", little)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    found = Scorer(model, ByteTokenizer()).score(windows)
    for row, other in zip(found, expected):
        assert [x for x, _ in row] == pytest.approx([x for x, _ in other], rel=1e-5)
    assert sizes[:4] == [10, 5, 2, 2] and max(sizes[3:]) <= 4, "and stays so"
    with pytest.raises(UserError, match=r"3 x 20 tokens do not fit .* a smaller --batch-size"):
        Scorer(model, ByteTokenizer(), rows=3).score(windows)
    with pytest.raises(UserError, match=r"1 x 60 tokens do not fit into the device's memory$"):
        Scorer(model, ByteTokenizer()).score([Window([1] * 60, [[2]])])


def test_endings_of_one_window_are_scored_by_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 3 * 260)
    model = byte_model()
    windows = [Window([5, 6, 7, 8], [[7, 8, 9], [3], []]), Window([9, 9], [[1]])]
    found = Scorer(model, ByteTokenizer()).score(windows)
    logits = plain_logits(model, [5, 6, 7, 8]).double().log_softmax(-1)
    three = float(logits[1, 7] + logits[2, 8] + logits[3, 9])
    assert found[0][0][0] == pytest.approx(three, rel=1e-5)
    assert found[0][1] == (pytest.approx(float(logits[3, 3]), rel=1e-5), bool(logits[3].argmax() == 3))
    assert found[0][2] == (0.0, True)
    assert len(found[1]) == 1


def test_an_evaluation_that_takes_too_long_is_given_up() -> None:
    told = "takes longer than 20 minutes: 0 of 1 requests to score are done"
    with pytest.raises(UserError, match=told):
        Scorer(byte_model(), ByteTokenizer(), deadline=Deadline(20.0, at=0.0)).score([Window([1], [[2]])])


def test_the_papers_columns_and_their_average() -> None:
    keys = ["lambada_openai/acc", "hellaswag/acc_norm", "piqa/acc", "arc_easy/acc", "arc_challenge/acc_norm"]
    # TokenFormer-150M in the paper's table 1.
    values = dict(zip(keys, (0.450, 0.355, 0.649, 0.473, 0.249)))
    found = {**values, "hellaswag/acc": 0.9, "arc_challenge/acc": 0.9, "piqa/acc_norm": 0.9}
    row = paper_columns({**found, "winogrande/acc": 0.504, "lambada_openai/perplexity": 16.38})
    assert row["LAMBADA ppl"] == 16.38
    assert round(row["average"] or 0.0, 1) == 44.7
    assert paper_columns(found)["average"] is None
    assert list(row)[1:] == ["LAMBADA acc", "HellaSwag", "PIQA", "ARC-E", "ARC-C", "WinoGrande", "average"]


@pytest.mark.parametrize("name", zero_shot.COLUMNS.values())
def test_the_papers_tasks_are_the_harness_s(name: str) -> None:
    task, metric = name.split("/")
    path = harness._manager([task], None).task_index[task].yaml_path
    assert path is not None
    config = load_yaml(path, resolve_func=False)
    assert metric in [told["metric"] for told in config["metric_list"]]


@pytest.mark.parametrize(
    "words, code, told",
    [
        (["--tasks", "toy_choice,no_such_task"], 2, "no task no_such_task in lm-evaluation-harness or .*own"),
        (["--include-path", "nowhere"], 2, "nowhere is no folder of tasks"),
        (["--limit", "0"], 2, "--limit 0 is too small; it must be at least 1"),
        (["--batch-size", "0"], 2, "--batch-size 0 is too small"),
        (["--output", "no/where.json"], 2, "there is no folder no"),
        (["--output", "tests"], 2, "--output tests is a folder"),
        (["--output", "pyproject.toml"], 2, "pyproject.toml already exists; remove it, or name another"),
        (["--output", "/proc/x.json"], 1, "--output /proc/x.json: nothing can be written in /proc"),
        (["--sequence-length", "3"], 1, "a continuation has [0-9]+ tokens, and the model sees 3"),
        (["--tasks", "toy_write", "--sequence-length", "6"], 1, "up to 6 tokens, and the model sees 6"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_words(
    trained: RunConfig,
    folder: str,
    words: list[str],
    code: int,
    told: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    given = ["--load", trained.run_dir, "--tasks", "toy_choice", "--include-path", folder]
    assert main([*given, *words]) == code
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert re.search(told, error), error


def test_a_mistake_in_the_tasks_is_told_before_any_model_is_loaded(
    trained: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(perplexity, "load_model")
    words = ["--load", trained.run_dir, "--data", trained.data.validation[0][1]]
    assert main([*words, "--tasks", "toy_choice", "--include-path", "nowhere"]) == 2
    assert "error: nowhere is no folder of tasks" in capsys.readouterr().err


def test_only_a_name_that_some_file_mentions_is_looked_up_in_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness.lm_eval.tasks, "__file__", str(tmp_path / "__init__.py"))
    (tmp_path / "any.yaml").write_text("task: sciq\n")
    asked = []

    def manager(include_path: list[Any], include_defaults: bool = True) -> Any:
        asked.append(include_defaults)
        return SimpleNamespace(all_tasks=["piqa", *["sciq"] * include_defaults])

    monkeypatch.setattr(harness, "TaskManager", manager)
    harness._manager(["piqa"], None)
    assert asked == [False]
    harness._manager(["sciq"], None)
    assert asked == [False, False, True]
    with pytest.raises(UserError, match="no task no_such_task in lm"):
        harness._manager(["sciq", "no_such_task"], None)
    assert asked == [False, False, True, False]


def test_figures_are_told_although_tasks_fail_or_the_output_cannot_be_written(
    trained: RunConfig,
    folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = trained.data.validation[0][1]
    words = ["--load", trained.run_dir, "--data", data, "--max-tokens", "9"]
    words += ["--tasks", "toy_grande", "--include-path", folder]
    assert main([*words, "--json", "--sequence-length", "3"]) == 1
    *table, last = capsys.readouterr().out.splitlines()
    assert any(line.startswith(data) for line in table)
    assert json.loads(last)["val_ppl"] > 1.0 and "tasks" not in json.loads(last)

    (tmp_path / "out").mkdir()
    found = commands.report_tasks

    def lose_the_folder(*given: Any) -> dict[str, Any]:
        (tmp_path / "out").rmdir()
        return found(*given)

    monkeypatch.setattr(commands, "report_tasks", lose_the_folder)
    assert main([*words, "--json", "--output", str(tmp_path / "out" / "all.json")]) == 1
    told = capsys.readouterr()
    assert "toy_grande/acc" in json.loads(told.out.splitlines()[-1])["tasks"]
    assert re.search(r"error: .*all\.json.*: No such file", told.err)

    def print_to_nobody(*_: Any) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(commands, "report_tasks", print_to_nobody)
    with pytest.raises(BrokenPipeError):
        main([*words, "--output", str(tmp_path / "all.json")])
    assert "toy_grande" in json.loads((tmp_path / "all.json").read_text())["results"]


def test_documents_that_cannot_be_had_are_told(
    trained: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_tasks(tmp_path / "own")
    (tmp_path / "own" / "toy_choice.jsonl").unlink()
    words = ["--load", trained.run_dir, "--tasks", "toy_choice", "--include-path", folder]
    assert main(words) == 1
    assert "error: task toy_choice cannot be loaded: " in capsys.readouterr().err


def test_without_the_harness_it_says_how_to_get_it(
    trained: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(zero_shot, "find_spec", lambda name: None)
    assert main(["--load", trained.run_dir, "--tasks", "piqa"]) == 2
    assert "pip install 'megatron-tokenformer[eval]'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--data", "x", "--limit", "3"]])
def test_options_that_do_nothing_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--load", "x", *words])
    assert ended.value.code == 2
    assert re.search("nothing to evaluate on|--limit without --tasks", capsys.readouterr().err)
