"""The benchmarks of Pattention: that contenders do the same work, and what the figures are figures of."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_tokenformer.errors import run_cli

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"

SAME_WORK = """
import argparse, sys, torch
sys.path.insert(0, sys.argv[1])
from pattention import CONTENDERS, make_work
for kind in ("l2_norm_gelu", "gelu_l2_norm", "softmax"):
    given = argparse.Namespace(width=32, tokens=20, device="cpu", dtype="fp32", score_norm=kind)
    work = make_work(48, 3, given)
    first, *others = [run(work) for name, run in CONTENDERS.items() if name != "products alone"]
    assert len(first) == 7 and len(others) == 4
    for other in others:
        for here, there in zip(first, other):
            torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)
"""


def run(*arguments: str) -> str:
    """Run Python with these arguments; return what it prints."""
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def report(name: str, *arguments: str) -> dict[str, Any]:
    """Run a benchmark; return the object that it prints last."""
    return json.loads(run(str(BENCHMARKS / name), *arguments, "--json").splitlines()[-1])


def test_all_contenders_compute_the_same_gradients() -> None:
    run("-c", SAME_WORK, str(BENCHMARKS))


def test_pattention_reports_ratios_to_the_products() -> None:
    told = report("pattention.py", "--sizes", "8", "--width", "16", "--tokens", "12", "--rounds", "2")
    assert [(row["place"], row["n"]) for row in told["results"]] == [("q, k, v", 8), ("FFN", 32)]
    for row in told["results"]:
        assert row["found"].pop("products alone")["ratio"] == 1.0
        assert len(row["found"]) == 5
        assert all(own["lowest"] <= own["ratio"] <= own["highest"] for own in row["found"].values())
    assert {"device", "torch", "triton", "commit"} <= told["environment"].keys()


def test_what_a_layer_keeps_without_scores_does_not_depend_on_its_tokens() -> None:
    sizes = ["--sizes", "576", "9216", "--width", "64", "--tokens", "256", "--sequence-length", "128"]
    kept = {
        policy: [figure["kept"] for figure in figures]
        for policy, figures in report("memory.py", *sizes, "--dtype", "fp32")["results"].items()
    }
    assert kept["scores"][1] == kept["scores"][0]
    assert kept["none"][1] - kept["none"][0] == 4 * 256 * 8 * (9216 - 576)  # fp32 scores, 8 s of each token
    assert kept["layer"][1] == kept["layer"][0] < kept["scores"][0] < kept["none"][0]


@pytest.mark.parametrize(
    "name, arguments, told",
    [
        ("pattention.py", ["--rounds", "0"], "at least 1"),
        ("pattention.py", ["--json", "nowhere/figures.json"], "no folder nowhere"),
        ("pattention.py", ["--device", "cuda:99"], "there is no cuda:99"),
        ("memory.py", ["--device", "gpu"], "none of cpu, cuda"),
        ("memory.py", ["--width", "32"], "--width 32"),
        ("memory.py", ["--tokens", "1000"], "whole sequences of 1024"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(
    name: str,
    arguments: list[str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as ended:
        run_cli(importlib.import_module(name.removesuffix(".py")).main)
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == ""
    assert told in said.err.splitlines()[-1]
