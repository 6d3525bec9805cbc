"""benchmarks/train_step.py trains each model and its twin and tells their figures; speed decides nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tokenformer.config.load import load_config
from megatron_tokenformer.config.sizes import flops_per_token, parameter_count

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    *("--configs", "124m", "--layers", "1", "--sequence-length", "16", "--micro-batch", "2"),
    *("--steps", "2", "--rounds", "1"),
]


def run(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, str(ROOT / "benchmarks/train_step.py"), *SMALL, *arguments]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)


def test_figures_are_those_of_the_models_on_two_tensor_ranks(tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    launcher += ("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0")
    path, small = tmp_path / "figures.json", "model.vocab_size=512"
    done = run("--folder", str(tmp_path), "--json", str(path), small, "parallel.tensor=2", launcher=launcher)
    assert done.returncode == 0, done.stderr
    names = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("| ")]
    assert names == ["", "Tokenformer 124m", "GPT 124m"]
    figures = json.loads(path.read_text())
    assert {"device", "torch", "commit", "date"} <= set(figures["environment"])
    for name, kind in (("Tokenformer 124m", "tokenformer"), ("GPT 124m", "transformer")):
        model = load_config(ROOT / f"configs/{kind}-124m.yaml", ["model.layers=1", small]).model
        ((own),) = figures["contenders"][name]
        assert own["parameters"] == parameter_count(model)
        assert "tensor 2" in own["layout"] and len(own["steps"]) == 2
        assert own["tokens_per_s"] == pytest.approx(2 * 16 / own["step_s"])
        flops = own["tokens_per_s"] * flops_per_token(model, 16) / 2  # a device has half
        assert own["tflops_per_device"] == pytest.approx(flops / 1e12)
    ours, twin = (figures["contenders"][name][0]["tokens_per_s"] for name in names[1:])
    assert figures["tokenformer_to_gpt"]["124m"] == pytest.approx([ours / twin])
    assert list(tmp_path.iterdir()) == [path], "data and runs are removed"


def test_a_mistake_is_told_before_anything_runs() -> None:
    done = run("model.attention_heads=5")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and "attention_heads=4 would work" in done.stderr
