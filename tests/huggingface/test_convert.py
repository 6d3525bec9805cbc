"""tools/convert_checkpoint.py with folders of Hugging Face: what a user types, sees and gets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_tokenformer.checkpoint.manifest import read_manifest
from megatron_tokenformer.checkpoint.portable import read_native, write_native
from megatron_tokenformer.commands.convert_checkpoint import main
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.huggingface import modeling_tokenformer
from tests.huggingface.models import KINDS, portable_model


def convert(source: str, load: Path, target: str, save: Path, *options: str) -> list[str]:
    return ["--from", source, "--load", str(load), "--to", target, "--save", str(save), *options]


@pytest.mark.parametrize("kind", KINDS)
def test_out_and_in_again(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_native(portable_model(kind), tmp_path / "native")
    assert main(convert("native", tmp_path / "native", "hf", tmp_path / "hf", "--json")) == 0
    out = capsys.readouterr().out.splitlines()
    assert "tokenizer: none, the checkpoint names none" in out
    assert any("largest difference of logits" in line for line in out)
    figures = json.loads(out[-1])["logits"]
    assert figures["largest"] > 1
    assert figures["share"] < 1e-5
    assert main(convert("hf", tmp_path / "hf", "native", tmp_path / "back")) == 0
    there, back = read_native(tmp_path / "native"), read_native(tmp_path / "back")
    assert (back.model, back.taus) == (there.model, there.taus)
    assert back.sequence_length == there.sequence_length
    assert all(torch.equal(there.tensors[name](), back.tensors[name]()) for name in there.tensors)
    assert read_manifest(tmp_path / "back/step-00000000").history[0]["from"] == str(tmp_path / "hf")


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_16_bits_are_compared_with_the_same_16_bits(
    dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_native(portable_model("l2_norm_gelu"), tmp_path / "native")
    options = ("--dtype", dtype, "--json")
    assert main(convert("native", tmp_path / "native", "hf", tmp_path / "hf", *options)) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["logits"]["share"] < 1e-5
    with pytest.raises(UserError, match="--dtype goes with --to hf"):
        main(convert("hf", tmp_path / "hf", "native", tmp_path / "back", "--dtype", dtype))


def test_another_function_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(str(modeling_tokenformer.__file__))
    wrong = tmp_path / "code" / source.name
    wrong.parent.mkdir()
    wrong.write_text(source.read_text().replace("ROTARY_BASE = 10_000.0", "ROTARY_BASE = 9_000.0"))
    monkeypatch.setattr(modeling_tokenformer, "__file__", str(wrong))
    write_native(portable_model("l2_norm_gelu"), tmp_path / "native")
    with pytest.raises(UserError, match=r"does not compute what .* does, so there is no .*/other;") as error:
        main(convert("native", tmp_path / "native", "hf", tmp_path / "other"))
    assert error.value.exit_code == 1
    assert not list(tmp_path.glob("*other*"))


def test_the_command_line_tells_a_mistake_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/config.json").write_text('{"model_type": "llama"}')
    command = [sys.executable, "-m", "megatron_tokenformer.commands.convert_checkpoint"]
    done = subprocess.run(
        [*command, *convert("hf", tmp_path / "foreign", "native", tmp_path / "native")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path}/foreign is a model of type 'llama'")
    assert not (tmp_path / "native").exists()
