"""benchmarks/growth.py runs and prints its table; how fast anything is decides nothing here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from megatron_tokenformer.config.load import dump_config
from tests.toy import toy_config

ROOT = Path(__file__).resolve().parents[2]


def test_the_benchmark_prints_a_table_and_removes_what_it_wrote(tmp_path: Path) -> None:
    larger = {"tokens": {"qkv": 96, "output": 32, "ffn": 200}}
    for name, config in (("small", toy_config(tmp_path)), ("large", toy_config(tmp_path, model=larger))):
        (tmp_path / f"{name}.yaml").write_text(dump_config(config))
    disk = tmp_path / "disk"
    disk.mkdir()
    command = [sys.executable, str(ROOT / "benchmarks/growth.py"), "--old", str(tmp_path / "small.yaml")]
    command += ["--config", str(tmp_path / "large.yaml"), "--folder", str(disk), "--rounds", "1"]
    command += ["--json", str(tmp_path / "figures.json")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    assert [line.split("|")[1].strip() for line in done.stdout.splitlines()[4:]] == [
        "copy",
        "growth",
        "growth --link",
        "growth --link --no-verify",
    ]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["bytes"] > figures["bytes_old"] + figures["bytes_new"]
    assert not list(disk.iterdir())
