"""The other example scripts, for real on tiny input; and all of them by shellcheck."""

from __future__ import annotations

import subprocess
from pathlib import Path

from megatron_tokenformer.data.tokenizer_training import train_tokenizer
from tests.cluster.hosts import ROOT, environment
from tests.cluster.slurm import Slurm
from tests.test_readme import TINY, write_texts

SCRIPTS = sorted([*ROOT.glob("examples/*/*.sh"), *ROOT.glob("examples/*/*.sbatch")])


def texts() -> list[str]:
    return [
        path.read_text(encoding="utf-8") for path in sorted((ROOT / "megatron_tokenformer").rglob("*.py"))
    ]


def test_the_scripts_please_shellcheck() -> None:
    assert len(SCRIPTS) >= 7
    done = subprocess.run(["shellcheck", *map(str, SCRIPTS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_an_array_job_tokenizes_what_one_pass_would(slurm: Slurm, tmp_path: Path) -> None:
    for number in range(5):
        write_texts(tmp_path / f"in/{number}.jsonl.zst", texts()[number::5])
    tokenizer = str(tmp_path / "tokenizer.json")
    train_tokenizer([str(tmp_path / "in/0.jsonl.zst")], "HFTokenizer", 500, tokenizer)
    given = {"INPUT": tmp_path / "in/*.jsonl.zst", "OUTPUT": tmp_path / "all", "TOKENIZER": tokenizer}
    script, log = ROOT / "examples/slurm/preprocess.sbatch", f"--output={tmp_path}/%A_%a.log"
    array = slurm.submit("--array=0-2", "--cpus-per-task=1", log, script, **given)
    after = f"--dependency=afterok:{array}"
    merge = slurm.submit(after, "--cpus-per-task=1", log, script, "merge", 3, **given)
    slurm.wait_for(merge, "COMPLETED")
    one = ["--input", given["INPUT"], "--output-prefix", tmp_path / "one", "--append-eod", "--workers", "1"]
    one += ["--tokenizer-type", "HFTokenizer", "--tokenizer-model", tokenizer]
    slurm.hosts.run(slurm.login, "python", "tools/preprocess_data.py", *one)
    for ending in (".bin", ".idx"):
        made = (tmp_path / f"all_text_document{ending}").read_bytes()
        assert made == (tmp_path / f"one_text_document{ending}").read_bytes()


def test_from_shards_of_the_pile_to_the_last_stage(tmp_path: Path) -> None:
    write_texts(tmp_path / "shards/train/00.jsonl.zst", texts())
    write_texts(tmp_path / "shards/val.jsonl.zst", texts()[:9])
    train_tokenizer([str(tmp_path / "shards/val.jsonl.zst")], "HFTokenizer", 500, str(tmp_path / "t.json"))
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples/pile").mkdir()
    (tmp_path / "examples/pile/run.sh").write_bytes((ROOT / "examples/pile/run.sh").read_bytes())
    for name in ("configs", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    given = {"PILE": "shards", "TOKENIZER": "t.json", "WORKERS": 1, "LAUNCHER": "local"}
    tiny = [f"common.{override}" for override in TINY]
    own = [
        f"stages.{name}.config.{key}"
        for name in ("354m", "757m", "1.4b")
        for key in ("training.steps=2", "optimizer.warmup_steps=0")
    ]
    words = ["launch.processes_per_node=2", "common.data.tokenizer.model=t.json", *tiny, *own]
    done = subprocess.run(
        ["bash", "examples/pile/run.sh", *words],
        cwd=tmp_path,
        env=environment(**given),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout
    run = tmp_path / "runs/pile-124m-to-1.4b"
    assert all((run / name / "finished.json").exists() for name in ("124m", "354m", "757m", "1.4b"))
    assert "| 1.4b |" in " ".join((run / "report.md").read_text().split())
