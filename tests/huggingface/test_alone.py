"""The exported folder needs nothing of ours; without transformers, what needs it says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tokenformer.huggingface.export import write_hf
from tests.huggingface.models import KINDS, native_model, portable_model, random_ids

ALONE = """
import json, sys
sys.modules["megatron_tokenformer"] = None  # an import of it fails
import torch
from transformers import AutoModelForCausalLM
answers = {}
for kind, folder in json.loads(sys.argv[1]).items():
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ids = torch.tensor(json.loads(sys.argv[2]))
    text = model.generate(ids, max_new_tokens=8, do_sample=False)
    answers[kind] = [model(ids).logits[0, -1].tolist(), text[0].tolist()]
print(json.dumps(answers))
"""
WITHOUT = """
import sys
sys.modules["transformers"] = None
from megatron_tokenformer.errors import run_cli
def main():
    import megatron_tokenformer.huggingface.read
    import megatron_tokenformer.huggingface.export
run_cli(main)
"""


def python(code: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_a_process_without_our_package_loads_it_and_generates(tmp_path: Path) -> None:
    folders, ids = {}, random_ids(1, 6)
    for kind in KINDS:
        write_hf(portable_model(kind), tmp_path / kind)
        folders[kind] = str(tmp_path / kind)
    done = python(ALONE, json.dumps(folders), json.dumps(ids.tolist()), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    for kind in KINDS:
        logits, text = answers[kind]
        expected = native_model(portable_model(kind), tmp_path / f"native-{kind}")(ids)[-1, 0]
        assert logits == pytest.approx(expected.tolist(), abs=1e-5 * expected.abs().max().item())
        assert text[:7] == [*ids[0].tolist(), expected.argmax().item()]
        assert len(text) == 14


def test_without_transformers_it_is_said_how_to_install_it(tmp_path: Path) -> None:
    done = python(WITHOUT, folder=Path.cwd())
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: writing a Hugging Face model needs transformers: pip install 'megatron-tokenformer[hf]'"
    )
