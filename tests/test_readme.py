"""The commands of the README run as written, on tiny input; and commands fail in words, not in tracebacks."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from megatron_tokenformer.checkpoint.store import find_checkpoint
from megatron_tokenformer.data.tokenizer_training import train_tokenizer
from megatron_tokenformer.metrics_file import read_rows
from tests.toy import write_tokens

ROOT = Path(__file__).parents[1]
TINY = [
    "model.layers=2",
    "model.hidden_size=32",
    "model.attention_heads=4",
    "model.vocab_size=512",
    "data.sequence_length=32",
    "optimizer.warmup_steps=0",
    "training.steps=4",
    "training.global_batch_size=8",
    "training.micro_batch_size=2",
    "training.precision=fp32",
    "training.eval_steps=2",
]
FEWER = {
    "--num_gpus 8": "--num_gpus 2",
    "--nproc-per-node 8": "--nproc-per-node 2",
    "--workers 32": "--workers 2",
}


def readme_commands() -> list[str]:
    """The commands of the README's tested section, each on one line."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    match = re.search(r"<!-- tests/test_readme.py .*?-->\n```bash\n(.*?)```", text, re.DOTALL)
    assert match, "the README has no tested section"
    lines = match[1].replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line and not line.startswith("#")]


def execute(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of this environment in `folder`."""
    beside = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{beside}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def write_texts(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": text, "meta": {"pile_set_name": "Test"}}) + "\n" for text in texts)
    path.write_bytes(zstandard.compress(lines.encode()))


@pytest.mark.long
def test_the_first_real_run_of_the_readme(tmp_path: Path) -> None:
    texts = [
        path.read_text(encoding="utf-8") for path in sorted((ROOT / "megatron_tokenformer").rglob("*.py"))
    ]
    write_texts(tmp_path / "pile/train/00.jsonl.zst", texts)
    write_texts(tmp_path / "pile/train/01.jsonl.zst", texts[::-1])
    write_texts(tmp_path / "pile/val.jsonl.zst", texts[:9])
    tokenizer = str(tmp_path / "20B_tokenizer.json")
    train_tokenizer([str(tmp_path / "pile/val.jsonl.zst")], "HFTokenizer", 500, tokenizer)
    for name in ("configs", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    commands = readme_commands()
    assert [command.split()[0] for command in commands] == [
        "python",
        "python",
        "deepspeed",
        "python",
        "torchrun",
    ]
    for command in commands:
        for many, few in FEWER.items():
            command = command.replace(many, few)
        tiny = [] if "preprocess_data" in command else TINY
        done = execute([*shlex.split(command), *tiny], tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert "Warning: " not in done.stderr, "third-party noise stays out of the log"
    before = find_checkpoint(tmp_path / "runs/tokenformer-124m")
    grown = read_rows(tmp_path / "runs/tokenformer-354m/metrics.jsonl")
    assert grown[0]["step"] == 0
    stored = json.loads((before / "manifest.json").read_text())["val_loss"]
    assert grown[0]["val_loss"] == pytest.approx(stored, rel=1e-6)
    assert grown[-1]["val_loss"] < stored


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a config and a finished run."""
    folder = tmp_path_factory.mktemp("commands")
    prefix = write_tokens(folder)
    tokens = "{qkv: 16, output: 16, ffn: 32}"
    (folder / "run.yaml").write_text(
        f"run_dir: {folder}/run\n"
        f"model: {{layers: 2, hidden_size: 32, attention_heads: 4, tokens: {tokens}, vocab_size: 64}}\n"
        f"data: {{train: {prefix}, sequence_length: 32}}\n"
        "training: {steps: 2, global_batch_size: 4, micro_batch_size: 2}\n"
    )
    done = execute(pretrain(), folder)
    assert done.returncode == 0, done.stderr
    return folder


def pretrain(*overrides: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "megatron_tokenformer.training.pretrain",
        "--config",
        "run.yaml",
        *overrides,
    ]


def grow(*overrides: str) -> list[str]:
    tool = str(ROOT / "tools/grow_checkpoint.py")
    return [sys.executable, tool, "--load", "run", "--config", "run.yaml", "--save", "grown", *overrides]


def leave(folder: Path) -> None:
    """Change nothing."""


def corrupt_manifest(folder: Path) -> None:
    for path in (folder / "run/checkpoints").glob("step-*/manifest.json"):
        path.write_text(path.read_text()[:-40])


def cut_tokens(folder: Path) -> None:
    tokens = folder / "toy_text_document.bin"
    content = tokens.read_bytes()
    tokens.unlink()  # a link to what other tests read
    tokens.write_bytes(content[:-2])


@pytest.mark.parametrize(
    "command, harm, code, words",
    [
        (pretrain("model.layer=3"), leave, 2, "unknown key 'model.layer'; did you mean 'model.layers'?"),
        (pretrain("model.tokens.qkv=15", "parallel.tensor=2"), leave, 2, "model.tokens.qkv=16 would work"),
        (pretrain("parallel.tensor=2"), leave, 2, "does not divide the 1 processes of this run"),
        (pretrain("data.train=nowhere"), leave, 2, "no data at 'nowhere'"),
        (pretrain("data.train=toy_text_document"), cut_tokens, 1, "toy_text_document is damaged: "),
        (
            pretrain("model.tokens.ffn=64"),
            leave,
            2,
            "ffn.key_tokens of shape [32, 32], the config's model has [64, 32]",
        ),
        (pretrain("run_dir=new", "checkpoint.load=nowhere"), leave, 2, "no complete checkpoint at nowhere"),
        (pretrain("run_dir=new", "checkpoint.load=run"), corrupt_manifest, 1, "manifest.json is damaged"),
        (grow("model.tokens.qkv=32"), corrupt_manifest, 1, "manifest.json is damaged"),
        (grow("model.tokens.qkv=8"), leave, 2, "model.tokens.qkv was 16, the config has 8"),
        (grow("--keys", "zero", "--values", "zero", "model.tokens.qkv=32"), leave, 2, "never learns"),
    ],
)
def test_mistakes_are_told_in_one_line(
    folder: Path, tmp_path: Path, command: list[str], harm: Callable[[Path], None], code: int, words: str
) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    if harm is not leave:
        (tmp_path / "run").unlink()
        subprocess.run(["cp", "-r", str(folder / "run"), str(tmp_path / "run")], check=True)
        harm(tmp_path)
    done = execute(command, tmp_path)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(
    "launcher", [["deepspeed", "--num_gpus", "2", "--module"], ["torchrun", "--nproc-per-node", "2", "-m"]]
)
def test_a_launcher_with_two_processes_passes_on_that_line_once(folder: Path, launcher: list[str]) -> None:
    """torchrun adds a traceback of its own, which is of its own files alone."""
    _, _, *command = pretrain("model.layer=3")
    done = execute([*launcher, *command], folder)
    said = done.stdout + done.stderr
    assert done.returncode != 0, said
    told = [line for line in said.splitlines() if "error: " in line and "unknown key 'model.layer'" in line]
    assert len(told) == 1, said
    assert told[0].endswith("did you mean 'model.layers'?")
    assert f'File "{ROOT}/megatron_tokenformer/' not in said
