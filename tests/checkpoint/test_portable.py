"""A model outside of any run: what is read of a checkpoint, and the checkpoint that is made of it."""

from __future__ import annotations

import weakref
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.growth import write_checkpoint
from megatron_tokenformer.checkpoint.manifest import read_manifest
from megatron_tokenformer.checkpoint.portable import PortableModel, read_native, write_native
from megatron_tokenformer.checkpoint.shards import verify_checkpoint
from megatron_tokenformer.checkpoint.store import find_checkpoint
from megatron_tokenformer.config.schema import Tokenizer
from megatron_tokenformer.data.provenance import TokenizerRecord
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.model.language_model import full_shapes
from tests.checkpoint.test_damage import edited
from tests.toy import DENSE, toy_config

MADE_WITH = TokenizerRecord("ByteTokenizer", fingerprint="0123456789ab", vocab_size=257)


def weights(model: PortableModel) -> dict[str, torch.Tensor]:
    return dict(model.read())


def same(first: PortableModel, second: PortableModel) -> bool:
    here, there = weights(first), weights(second)
    return here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)


@pytest.mark.parametrize("changes", [{}, DENSE], ids=["tokenformer", "dense"])
def test_a_model_comes_back_bit_for_bit(tmp_path: Path, changes: dict[str, object]) -> None:
    config = toy_config(tmp_path, model=changes, data={"tokenizer": {"type": "ByteTokenizer"}})
    source = write_checkpoint(tmp_path / "run/checkpoints", config, ranks=3)  # cut anywhere
    edited(lambda stored: stored.update(tokenizer=asdict(MADE_WITH)))(source)
    model = read_native(tmp_path / "run")
    assert model.model == config.model
    assert model.sequence_length == 32
    assert model.tokenizer == Tokenizer(type="ByteTokenizer")
    assert {name: tuple(t.shape) for name, t in weights(model).items()} == full_shapes(config.model)

    path = write_native(model, tmp_path / "portable")
    assert path == find_checkpoint(tmp_path / "portable")
    assert (tmp_path / "portable/latest").read_text() == "step-00000000\n"
    manifest = verify_checkpoint(path)
    assert manifest.tokenizer == model.made_with == MADE_WITH
    assert (manifest.step, manifest.adam_step, manifest.states) == (0, 0, ["weight"])
    assert [(entry["kind"], entry["from"]) for entry in manifest.history] == [("import", str(source))]
    again = read_native(path)
    assert same(again, model)
    assert replace(again, tensors={}) == replace(model, tensors={})
    assert read_manifest(source).states != manifest.states, "the source had an optimizer's state"


def test_tau_is_that_of_the_checkpoints_step(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "run/checkpoints", toy_config(tmp_path), ranks=1)
    on_its_way = {"start": 2.0, "end": 6.0, "steps": 40}
    edited(lambda stored: stored["taus"].update(ffn=on_its_way))(source)  # of step 10
    model = read_native(source)
    assert model.taus == {"qkv": 4.0, "output": 4.0, "ffn": 3.0}
    written = read_manifest(write_native(model, tmp_path / "portable"))
    assert written.taus["ffn"] == {"start": 3.0, "end": 3.0, "steps": 0}


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def make(shape: tuple[int, ...]) -> torch.Tensor:
        nonlocal most
        alive.add(tensor := torch.zeros(shape))
        most = max(most, len(alive))
        return tensor

    model = toy_config(tmp_path).model
    tensors = {name: partial(make, shape) for name, shape in full_shapes(model).items()}
    write_native(PortableModel(model, 32, {"qkv": 4.0, "output": 4.0, "ffn": 8.0}, tensors), tmp_path / "new")
    assert most == 2, "the last one goes when the next one is there"


def test_a_folder_that_holds_anything_is_refused_and_left_alone(tmp_path: Path) -> None:
    model = read_native(write_checkpoint(tmp_path / "run/checkpoints", toy_config(tmp_path), ranks=1))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="checkpoints already; give a folder that is new or empty"):
        write_native(model, tmp_path / "run")
    with pytest.raises(UserError, match="is a file"):
        write_native(model, tmp_path / "toy_text_document.idx")
    assert sorted(tmp_path.rglob("*")) == before


def test_what_an_interrupted_write_left_is_no_obstacle(tmp_path: Path) -> None:
    model = read_native(write_checkpoint(tmp_path / "run/checkpoints", toy_config(tmp_path), ranks=1))
    left = tmp_path / "new/.step-00000000.writing"
    left.mkdir(parents=True)
    (left / "imported.safetensors").write_bytes(b"half")
    write_native(model, tmp_path / "new")
    assert not left.exists()
    assert same(read_native(tmp_path / "new"), model)


def test_a_damaged_source_leaves_nothing_behind(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "run/checkpoints", toy_config(tmp_path), ranks=1)
    model = read_native(source)
    shard = source / "rank-00000.safetensors"
    shard.write_bytes(b"\0" * shard.stat().st_size)
    with pytest.raises(UserError, match=r"rank-00000\.safetensors"):
        write_native(model, tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
