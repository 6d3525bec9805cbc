"""benchmarks/communication.py runs on two ranks and tells bytes by the formulas; how long decides nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_benchmark_prints_a_table_and_writes_the_figures(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += [
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "127.0.0.1:0",
        str(ROOT / "benchmarks/communication.py"),
    ]
    command += ["--sizes", "1.4b", "--positions", "16", "--rounds", "1", "--json", str(path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=False, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    names = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("| ")]
    assert names == ["model", "Tokenformer 1.4b", "GPT 1.3b"]
    figures = json.loads(path.read_text())
    assert figures["ranks"] == 2 and figures["backend"] == "gloo"
    assert {"device", "torch", "commit", "date"} <= set(figures["environment"])
    ours, gpt = figures["models"]
    # 16 and 8 tensors of [s, b, d] per layer, 4 more at the ends, half of each sent; row totals; the loss.
    x, loss = 16 * 2, 3 * 16 * 4
    assert ours["sent_bytes"] == (12 * 16 + 4) * x * 768 / 2 + 12 * 80 * 16 / 2 + loss
    assert gpt["sent_bytes"] == (24 * 8 + 4) * x * 2048 / 2 + loss
    assert figures["gpt_to_tokenformer"][0]["bytes"] == pytest.approx(gpt["sent_bytes"] / ours["sent_bytes"])


def test_one_process_is_refused() -> None:
    command = [sys.executable, str(ROOT / "benchmarks/communication.py")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=False, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 2
    assert "torchrun --nproc-per-node 2" in done.stderr
