"""examples/scaling_study: every arm sees the same data, growth is exact, the report tells what runs did."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_tokenformer.checkpoint.manifest import read_manifest
from megatron_tokenformer.checkpoint.store import find_checkpoint
from megatron_tokenformer.metrics_file import read_rows
from tests.toy import DENSE, write_tokens

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples/scaling_study"


def study(folder: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, EXAMPLE / "study.py", *words], cwd=folder, capture_output=True, text=True
    )


def stage(name: str, steps: int, **model: Any) -> dict[str, Any]:
    return {"name": name, "config": {"model": model, "training": {"steps": steps}}}


def minuscule(folder: Path) -> Path:
    """Three arms, of steps that take milliseconds."""
    prefix = write_tokens(folder)
    small, large = ({"tokens": {"qkv": n, "output": n, "ffn": 4 * n}} for n in (4, 8))
    wide = {**DENSE, "score_norm": None, "hidden_size": 16, "attention_heads": 4}
    tree = {
        "run_dir": str(folder / "study"),
        "seeds": [1],
        "subject": "grown",
        "reference": "scratch",
        "common": {
            "model": {"layers": 1, "hidden_size": 8, "attention_heads": 2, "vocab_size": 64},
            "data": {"train": prefix, "validation": prefix, "sequence_length": 16},
            "optimizer": {"lr": 3e-3, "min_lr": 3e-4},
            "training": {
                **{"global_batch_size": 4, "micro_batch_size": 4, "precision": "fp32"},
                **{"eval_interval": 2, "eval_steps": 1, "log_interval": 1},
            },
            "checkpoint": {"interval": 0},
        },
        "arms": [
            {"name": "grown", "title": "grown", "stages": [stage("a", 4, **small), stage("b", 4, **large)]},
            {"name": "scratch", "title": "from scratch", "stages": [stage("b", 8, **large)]},
            {
                **{"name": "net2net", "title": "Net2Net", "common": {"model": wide}},
                "stages": [stage("a", 4, hidden_size=8, attention_heads=2), stage("b", 4)],
            },
        ],
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def losses(run: Path) -> list[tuple[int, float]]:
    """Steps and losses of a run's stages, one after another."""
    stages = [path.parent for path in sorted(run.glob("*/metrics.jsonl"))]
    rows = [row for each in stages for row in read_rows(each / "metrics.jsonl")]
    return [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]


@pytest.mark.long
def test_arms_are_trained_once_and_compared(tmp_path: Path) -> None:
    path = minuscule(tmp_path)
    done = study(tmp_path, "--config", path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "study/results.json").read_text())
    told = results["arms"]
    assert len(results["calls"]) == 1
    text = (tmp_path / "study/results.md").read_text()
    assert (tmp_path / "study/perplexity_vs_flops.png").stat().st_size > 10_000
    for name in ("grown", "scratch", "net2net"):
        run = tmp_path / "study/seed-1" / name
        assert read_manifest(find_checkpoint(run / "b")).position == 8 * 4, "stages go on in the data"
        (own,) = told[name]["runs"]
        assert own["tokens"] == 8 * 4 * 16
        assert own["val_loss"] == losses(run)[-1][1] and f"| {own['val_loss']:.4f} |" in text
        assert own["flops"] == read_rows(run / "b/metrics.jsonl")[-1]["flops"]
        if name != "scratch":
            after = [step for step, _ in losses(run)].index(0, 1)
            assert losses(run)[after][1] == pytest.approx(losses(run)[after - 1][1], rel=1e-6)
            assert own["change_at_growths"] == pytest.approx([0.0], abs=1e-6)
    again = study(tmp_path, "--config", path)
    assert again.returncode == 0 and again.stdout == done.stdout, again.stderr


def test_flops_to_a_loss_are_between_the_measurements_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    from arms import Arm, Study
    from outcome import Curve, Outcome, own_budget

    curve = Curve(1, [(0.0, 6.0), (1e12, 5.0), (4e12, 4.0), (8e12, 4.5)], [], 0)
    assert curve.flops_at(5.0) == 1e12
    assert curve.flops_at(4.5) == pytest.approx(2e12)  # half of the way, on a logarithmic axis
    assert curve.flops_at(3.9) is None
    stages = [{"name": "a"}]
    arms = [Arm(name=name, title=name, stages=stages) for name in ("grown", "scratch")]
    arms.append(Arm(name="short", title="short", budget_of="scratch", stages=stages))
    whole = Study(run_dir="x", seeds=[1], subject="grown", reference="scratch", arms=arms)
    ends = {"scratch": (8e12, 4.0), "short": (2e12, 5.0)}
    found = [Outcome(arm, 1, [Curve(1, [ends[arm.name]], [], 0)]) for arm in arms[1:]]
    assert own_budget(whole, found, 1, 4.5) == pytest.approx(4e12)
    assert own_budget(whole, found, 1, 3.9) is None and own_budget(whole, found, 1, 5.1) is None


@pytest.mark.parametrize(
    "change, words",
    [
        ("common.training.steps=9", "arm grown sees 512 tokens and scratch 576"),
        ("subject=other", "subject is other, which is none of the arms grown, scratch"),
        ("jbos=1", "jbos"),
    ],
)
def test_what_would_compare_nothing_is_refused_in_words(tmp_path: Path, change: str, words: str) -> None:
    path = minuscule(tmp_path)
    tree = yaml.safe_load(path.read_text())
    del tree["arms"][1]["stages"][0]["config"]["training"]  # scratch goes by common.training.steps
    tree["common"]["training"]["steps"] = 8
    path.write_text(yaml.safe_dump(tree))
    done = study(tmp_path, "--config", path, "--dry-run", change)
    assert done.returncode == 2 and words in done.stderr, done.stderr


@pytest.mark.parametrize("name, largest", [("study", "1.45M"), ("lr_check", "1.45M"), ("gpu", "1515.55M")])
def test_the_studies_fit_together(tmp_path: Path, name: str, largest: str) -> None:
    done = study(tmp_path, "--config", EXAMPLE / f"{name}.yaml", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert largest in done.stdout
