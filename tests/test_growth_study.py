"""examples/growth_study: its commands work, what is finished is skipped, the table tells what runs did."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tokenformer.metrics_file import read_rows
from tests.toy import write_tokens

ROOT = Path(__file__).parents[1]


def study(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """One learning rate, one seed, two variants, a few steps, from another folder than the project's."""
    prefix = folder / "toy_text_document"
    data = [f"data.{part}={prefix}" for part in ("train", "validation")]
    small = ["training.global_batch_size=2", "training.micro_batch_size=2", "training.eval_steps=1"]
    sizes = ["--lr", "1e-3", "--seeds", "1", "--base-steps", "2", "--json", "losses.json"]
    return subprocess.run(
        [
            *(sys.executable, ROOT / "examples/growth_study/study.py", *sizes, *words),
            *("--set", *data, *small, "optimizer.warmup_steps=0"),
        ],
        cwd=folder,
        capture_output=True,
        text=True,
    )


@pytest.mark.long
def test_variants_are_trained_once_and_compared(tmp_path: Path) -> None:
    write_tokens(tmp_path)
    words = ("--steps", "2", "--variants", "tau kept", "random keys, tau annealed")
    done = study(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs/growth_study/lr-0.001-seed-1"
    base, kept, other = (
        [row["val_loss"] for row in read_rows(run / name / "metrics.jsonl") if "val_loss" in row]
        for name in ("base", "tau-kept", "random-keys-tau-annealed")
    )
    assert kept[0] == pytest.approx(base[-1], rel=1e-6)
    assert other[0] != pytest.approx(base[-1], rel=1e-6)
    told = json.loads((tmp_path / "losses.json").read_text())["losses"]
    assert told["tau kept"]["0.001"] == [{"start": kept[0], "end": kept[-1]}]
    row = next(line for line in done.stdout.splitlines() if line.startswith("| random keys"))
    assert f"| {other[0]:.3f} | {other[-1]:.4f} |" in row
    again = study(tmp_path, *words)
    assert again.stdout == done.stdout
    refused = study(tmp_path, "--steps", "3", "--variants", "tau kept")
    assert refused.returncode == 2 and "has done 2 steps, not 3" in refused.stderr
