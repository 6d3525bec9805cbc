"""The quick start works as written, in an empty folder; with fewer steps and less text, for time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tokenformer.metrics_file import read_rows
from tests.docs.pages import code_blocks
from tests.test_readme import execute

FEWER = {
    "[a-s]*.py": "a[a-s]*.py",
    "[t-z]*.py": "t[a-h]*.py",
    "steps: 200": "steps: 6",
    "eval_interval: 100": "eval_interval: 0, eval_steps: 1",
    "warmup_steps: 20": "warmup_steps: 0",
    "--vocab-size 2048": "--vocab-size 512",
    "tokenformer ": f"{sys.executable} -m megatron_tokenformer ",
}


@pytest.mark.long
def test_the_quick_start(tmp_path: Path) -> None:
    script = "set -e\n" + "\n".join(code_blocks("quickstart.md", "bash"))
    for text, less in FEWER.items():
        assert text in script
        script = script.replace(text, less)
    done: subprocess.CompletedProcess[str] = execute(["bash", "-c", script], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    small, grown = (read_rows(tmp_path / f"runs/{name}/metrics.jsonl") for name in ("small", "grown"))
    assert small[-1]["step"] == grown[-1]["step"] == 6
    assert grown[0]["val_loss"] == pytest.approx(small[-1]["val_loss"], rel=1e-6)
    assert grown[-1]["val_loss"] < small[-1]["val_loss"] < small[0]["val_loss"]
    assert json.loads((tmp_path / "runs/grown/finished.json").read_text())["parameters"] > 1_000_000
    assert "bits per byte" in done.stdout
