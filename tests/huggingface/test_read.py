"""Folders that are not a model of ours, or are damaged, are refused in words, and none of their code runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_tokenformer.errors import UserError
from megatron_tokenformer.huggingface.export import write_hf
from megatron_tokenformer.huggingface.read import read_hf
from tests.huggingface.models import portable_model

Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that can be read."""
    folder = tmp_path_factory.mktemp("sound") / "hf"
    write_hf(portable_model("l2_norm_gelu"), folder, max_shard_bytes=30_000)
    return folder


def config(**fields: Any) -> Damage:
    """Change keys of config.json."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def index(**fields: Any) -> Damage:
    """Change keys of the index of weights."""

    def change(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Change the tensors of the first shard."""

    def rewrite(folder: Path) -> None:
        path = min(folder.glob("model-*.safetensors"))
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return rewrite


def cut(folder: Path) -> None:
    """Lose the end of the last shard."""
    path = max(folder.glob("model-*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])


FIRST = "model.layers.0.attention.query.key_tokens"
REFUSED: dict[str, tuple[Damage, str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "is no Hugging Face model"),
    "no json": (lambda folder: (folder / "config.json").write_text("{"), "config.json is not valid JSON"),
    "foreign": (config(model_type="gpt_neox"), "is a model of type 'gpt_neox'; only 'tokenformer'"),
    "untyped": (config(model_type=None), "is a model of type 'None'"),
    "untied": (config(tie_word_embeddings=False), "has an untied head"),
    "heads": (config(num_attention_heads=5), "hidden_size=32 is not divisible by model.attention_heads=5"),
    "norm": (config(score_norm="l1"), "score_norm='l1'"),
    "length": (config(max_position_embeddings=0), "sequence_length=0"),
    "no tau": (config(tau=None), "tau.qkv is None, not a positive number"),
    "tau": (config(tau={"qkv": 4.0, "output": 4.0, "ffn": "8"}), "tau.ffn is 8, not a positive number"),
    "layers": (config(num_hidden_layers=3), "has no tensor model.layers.2.attention.query.key_tokens"),
    "fewer": (config(num_hidden_layers=1), "has a tensor model.layers.1.*that the model.*has not"),
    "missing": (weights(lambda there: there.pop(FIRST)), f"has no tensor {FIRST}"),
    "shape": (
        weights(lambda there: there.update({FIRST: torch.zeros(15, 32)})),
        rf"{FIRST} of shape \[15, 32\], the model of config.json has \[16, 32\]",
    ),
    "more": (weights(lambda there: there.update(extra=torch.zeros(1))), "has a tensor extra that"),
    "cut": (cut, "cannot be read as safetensors"),
    "no shard": (lambda folder: max(folder.glob("model-*")).unlink(), "cannot be read as safetensors"),
    "no weights": (
        lambda folder: (folder / "model.safetensors.index.json").unlink(),
        r"model\.safetensors cannot be read",
    ),
    "elsewhere": (index(weight_map={FIRST: "../../x.safetensors"}), "does not name files of its folder"),
    "lists": (index(weight_map={FIRST: []}), "does not name files of its folder"),
    "no map": (index(weight_map=None), "does not name files of its folder"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_it_is_refused_in_a_line(kind: str, sound: Path, tmp_path: Path) -> None:
    damage, told = REFUSED[kind]
    folder = tmp_path / "hf"
    shutil.copytree(sound, folder)
    damage(folder)
    with pytest.raises(UserError, match=told) as error:
        read_hf(folder)
    assert "\n" not in str(error.value)


def test_the_folders_code_does_not_run(sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(sound, folder)
    for path in folder.glob("*.py"):
        path.write_text("raise SystemExit('run')")
    read_hf(folder).tensors["final_norm.bias"]()
