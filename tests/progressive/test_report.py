"""The report says what journal and metrics hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_tokenformer.progressive.__main__ import main
from megatron_tokenformer.progressive.journal import Journal
from megatron_tokenformer.progressive.plan import load_plan
from megatron_tokenformer.progressive.report import stage_results, write_report

Tree = dict[str, Any]
Write = Callable[[Tree], Path]


def made_up(folder: Path, done: int) -> Journal:
    """Stages a, b, c with falling losses, of which the first `done` are done."""
    journal = Journal(folder / "journal.json")
    flops, loss = 0.0, 4.0
    for index, name in enumerate("abc"[:done]):
        (folder / name).mkdir(parents=True)
        rows: list[Tree] = [{"step": 0, "flops": flops, "val_loss": loss * (1 + 1e-7 * index)}]
        for step in range(1, 5):
            loss, flops = loss - 0.2 / (index + 1), flops + 1e9 * (index + 1)
            rows += [{"step": step, "flops": flops, "loss": loss}]
            rows += [{"step": step, "flops": flops, "val_loss": loss, "val_ppl": 1.0}]
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        journal.begin(name, "train", {})
        journal.add_seconds(name, "train", 61.4)
        result = {"val_loss": loss, "tokens": 256 * (index + 1), "flops": flops, "layout": f"tensor {index}"}
        journal.end(name, "train", "done", result)
    return journal


def test_a_line_per_stage_and_the_largest_change(schedule: Tree, write: Write) -> None:
    plan = load_plan(write(schedule))
    table = write_report(plan, made_up(plan.folder, 3))
    header, rule, first, second, third = table.splitlines()[:5]
    assert len({len(line) for line in (header, rule, first, second, third)}) == 1, "straight on a terminal"
    cells = [cell.strip() for cell in second.split("|")[1:-1]]
    assert cells[:2] + cells[3:] == [
        *("b", "tensor 1", "16 / 16 / 64", "3.2000", "3.2000", "2.8000"),
        *("512", "1.20e+10", "61"),
    ]
    assert [cell.strip() for cell in first.split("|")[5:8]] == ["-", "-", "3.2000"]
    assert "Largest relative change of the loss at a growth: 2.0e-07 (stage c)." in table
    report = (plan.folder / "report.md").read_text()
    assert table in report and "(loss_vs_flops.png)" in report
    assert (plan.folder / "loss_vs_flops.png").stat().st_size > 10_000


def test_a_schedule_half_done(schedule: Tree, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    plan = load_plan(write(schedule))
    made_up(plan.folder, 1)
    assert main(["--config", str(write(schedule)), "--report-only"]) == 0
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines()]
    cells = next(line for line in lines if len(line) > 1 and line[1].strip() == "b")
    assert [cell.strip() for cell in cells[5:-1]] == ["3.2000", "-", "-", "-", "-", "-"]


def test_nothing_done_yet(schedule: Tree, write: Write) -> None:
    plan = load_plan(write(schedule))
    plan.folder.mkdir()
    table = write_report(plan, Journal(plan.folder / "journal.json"))
    assert "Largest" not in table
    assert "png" not in (plan.folder / "report.md").read_text()


def test_losses_over_other_batches_are_not_compared(schedule: Tree, write: Write) -> None:
    schedule["stages"][1]["config"]["data"] = {"validation": "another/prefix"}
    schedule["stages"][2]["config"]["data"] = {"validation": "another/prefix"}
    plan = load_plan(write(schedule))
    journal = made_up(plan.folder, 3)
    assert [result.change is None for result in stage_results(plan, journal)] == [True, True, False]
    assert "Evaluated on other batches than the stage before, so not compared: b." in write_report(
        plan, journal
    )
