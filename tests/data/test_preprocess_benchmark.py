"""benchmarks/preprocess.py runs and prints its table; how fast anything is decides nothing here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_benchmark_prints_a_table_and_writes_its_figures(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/preprocess.py"), "--json", str(tmp_path / "a.json")]
    command += ["--megabytes", "0.3", "--vocab-size", "500", "--rounds", "1", "--workers", "2"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split("|")[1].strip() for line in lines[4:]] == [
        "the tool",
        "the tool, start-up taken off",
        "bare fastokens",
        "bare HF tokenizers",
    ]
    figures = json.loads((tmp_path / "a.json").read_text())
    assert figures["tokens"] > 10_000
    rates = {name: rate["median"] for name, rate in figures["tokens_per_second"].items()}
    # Start-up is taken off by subtraction: with so little input, a busy machine can leave less than none.
    assert all(rate > 0 for name, rate in rates.items() if name != "rest")
