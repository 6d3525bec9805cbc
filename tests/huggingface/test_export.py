"""The folder that is written: complete or not there, the same numbers, read back bit for bit."""

from __future__ import annotations

import json
import re
import resource
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from megatron_tokenformer.checkpoint.portable import PortableModel, read_native, write_native
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.huggingface.export import DTYPES, hf_logits, write_hf
from megatron_tokenformer.huggingface.read import read_hf
from tests.huggingface.models import (
    KINDS,
    Pair,
    assert_same,
    load_hf,
    native_model,
    portable_model,
    random_ids,
)

FILES = [
    "README.md",
    "config.json",
    "configuration_tokenformer.py",
    "generation_config.json",
    "model.safetensors",
    "modeling_tokenformer.py",
]


def assert_equal(first: PortableModel, second: PortableModel) -> None:
    assert replace(first, tensors={}, tokenizer=None) == replace(second, tensors={}, tokenizer=None)
    here, there = dict(first.read()), dict(second.read())
    assert here.keys() == there.keys()
    for name, tensor in here.items():
        assert there[name].dtype == torch.float32
        assert torch.equal(tensor, there[name]), name


def test_a_model_comes_back_bit_for_bit(pair: Pair, tmp_path: Path) -> None:
    assert sorted(path.name for path in pair.folder.iterdir()) == FILES
    back = read_hf(pair.folder)
    assert_equal(back, pair.portable)
    assert_equal(read_native(write_native(back, tmp_path / "native")), pair.portable)


def test_config_json_says_what_the_model_is(pair: Pair) -> None:
    config = AutoConfig.from_pretrained(pair.folder, trust_remote_code=True)
    assert config.tau == (pair.portable.taus or None)
    assert config.dtype == torch.float32
    assert config.architectures == ["TokenformerForCausalLM"]
    assert (config.max_position_embeddings, config.tie_word_embeddings) == (48, True)
    assert hf_logits(pair.folder, random_ids(1, 5)).shape == (1, 5, 64)


@pytest.mark.parametrize("kind", KINDS)
def test_shards_with_an_index_are_the_same_model(kind: str, tmp_path: Path) -> None:
    portable = portable_model(kind)
    write_hf(portable, tmp_path / "hf", max_shard_bytes=10_000)
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "hf").glob("model-*.safetensors"))
    assert len(shards) > 3
    assert {name: shard.name for shard in shards for name in load_file(shard)} == index["weight_map"]
    assert_equal(read_hf(tmp_path / "hf"), portable)
    ids = random_ids(2, 9)
    native = native_model(portable, tmp_path / "native")
    assert_same(load_hf(tmp_path / "hf")(ids).logits, native(ids).transpose(0, 1))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_weights_in_16_bits(dtype: str, tmp_path: Path) -> None:
    portable = portable_model("l2_norm_gelu")
    write_hf(portable, tmp_path / "hf", dtype)
    stored = load_file(tmp_path / "hf/model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {DTYPES[dtype]}
    assert load_hf(tmp_path / "hf").dtype == DTYPES[dtype]
    rounded = portable.rounded(DTYPES[dtype])
    assert_equal(read_hf(tmp_path / "hf"), rounded)
    native = native_model(rounded, tmp_path / "native")
    ids = random_ids(2, 30)
    assert_same(hf_logits(tmp_path / "hf", ids), native(ids).transpose(0, 1))


def test_memory_holds_one_shard(tmp_path: Path) -> None:
    portable, alive, most = portable_model("l2_norm_gelu"), weakref.WeakSet(), [0]

    def read(name: str) -> Tensor:
        tensor = portable.tensors[name]()
        alive.add(tensor)
        most[0] = max(most[0], sum(t.nbytes for t in alive))
        return tensor

    watched = replace(portable, tensors={name: partial(read, name) for name in portable.tensors})
    largest = max(tensor.nbytes for _, tensor in portable.read())
    write_hf(watched, tmp_path / "hf", max_shard_bytes=10_000)
    assert 0 < most[0] <= 10_000 + largest < sum(t.nbytes for _, t in portable.read()) / 2


def test_nothing_is_there_after_a_failure(tmp_path: Path) -> None:
    portable = portable_model("l2_norm_gelu")

    def damaged() -> Tensor:
        raise UserError("shard 7 is damaged", exit_code=1)

    tensors = {**portable.tensors, "final_norm.bias": damaged}
    with pytest.raises(UserError, match="shard 7 is damaged"):
        write_hf(replace(portable, tensors=tensors), tmp_path / "new/hf")
    assert list((tmp_path / "new").iterdir()) == []


def test_what_a_user_has_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"hf holds notes\.txt already"):
        write_hf(portable_model("l2_norm_gelu"), tmp_path / "hf")
    assert [path.name for path in tmp_path.rglob("*")] == ["hf", "notes.txt"]
    (tmp_path / "hf/notes.txt").unlink()
    write_hf(portable_model("l2_norm_gelu"), tmp_path / "hf")  # a new or an empty folder is taken
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == FILES
    (tmp_path / "of_mine").touch()
    modes = {path.stat().st_mode for path in [*(tmp_path / "hf").iterdir(), tmp_path / "of_mine"]}
    assert len(modes) == 1, "whoever may read my files may read these"


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_tokenformer.huggingface.export.check_space", lambda *_: None)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limit[1]))  # the weights take more, nothing else does
    try:
        with pytest.raises(UserError, match=r"cannot write a Hugging Face model into .*hf: .") as error:
            write_hf(portable_model("l2_norm_gelu"), tmp_path / "hf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert error.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_the_card_shows_how_to_load_it(pair: Pair) -> None:
    card = (pair.folder / "README.md").read_text()
    dense = pair.portable.model.is_dense
    assert f"{sum(tensor.numel() for _, tensor in pair.portable.read()):,}" in card
    assert ("qkv 16, output 12, ffn 40" in card) is not dense
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    known = {"ids": random_ids(1, 4)}
    exec(code.group(1).replace("FOLDER", str(pair.folder)), known)
    assert GenerationConfig.from_pretrained(pair.folder).eos_token_id is None
