"""A model as a folder that transformers loads: config.json, the model's code, safetensors, tokenizer."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_tokenformer.checkpoint.portable import PortableModel, check_new
from megatron_tokenformer.checkpoint.step_zero import check_space
from megatron_tokenformer.checkpoint.store import make_empty
from megatron_tokenformer.config.sizes import parameter_count
from megatron_tokenformer.durable import sync_folder
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.evaluation.load import DTYPES
from megatron_tokenformer.huggingface.card import model_card
from megatron_tokenformer.huggingface.names import (
    SEQUENCE_LENGTH,
    WEIGHTS,
    WEIGHTS_INDEX,
    exported,
    exported_fields,
    exported_name,
)
from megatron_tokenformer.model.language_model import full_shapes

try:
    import transformers
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, GenerationConfig
except ModuleNotFoundError as missing:
    raise UserError(
        f"writing a Hugging Face model needs {missing.name}: pip install 'megatron-tokenformer[hf]'"
    ) from None
if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24):
    raise UserError(
        f"transformers {transformers.__version__} is too old to write a Hugging Face model: "
        f"pip install 'megatron-tokenformer[hf]'"
    )

from megatron_tokenformer.huggingface import configuration_tokenformer, modeling_tokenformer
from megatron_tokenformer.huggingface.tokenizer import ExportedTokenizer, write_tokenizer

CODE = (configuration_tokenformer, modeling_tokenformer)
AUTO_MAP = {
    "AutoConfig": "configuration_tokenformer.TokenformerConfig",
    "AutoModel": "modeling_tokenformer.TokenformerModel",
    "AutoModelForCausalLM": "modeling_tokenformer.TokenformerForCausalLM",
}
Dtype = Literal["fp32", "bf16", "fp16"]
MAX_SHARD_BYTES = 5 * 10**9


def write_hf(
    portable: PortableModel,
    folder: Path,
    dtype: Dtype = "fp32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> ExportedTokenizer:
    """Write a model as a new folder for transformers, and return what became of its tokenizer.

    Memory holds one shard.  The folder is complete or not there.

    Args:
        dtype: of the weights in the folder.
        max_shard_bytes: of each file of weights; a tensor is never divided.

    Raises:
        UserError: the folder holds something already, there is no room, it cannot be written, or the source
            is damaged; nothing new is then there.
    """
    check_new(folder)
    doing = f"write a Hugging Face model into {folder}"
    folder = folder.absolute()
    temporary = folder.with_name(f".{folder.name}.writing")
    kind = DTYPES[dtype]
    try:
        make_empty(temporary)
        check_space(folder, doing, parameter_count(portable.model) * kind.itemsize)
        tokenizer = write_tokenizer(portable, temporary)
        write_configuration(portable, temporary, kind, tokenizer.eod_id)
        write_weights(portable, temporary, kind, max_shard_bytes)
        card = model_card(portable, dtype, has_tokenizer=(temporary / "tokenizer.json").exists())
        (temporary / "README.md").write_text(card, encoding="utf-8")
        publish(temporary, folder)
    except (OSError, SafetensorError) as error:  # the latter where a disk is full
        raise UserError(f"cannot {doing}: {getattr(error, 'strerror', error)}", exit_code=1) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return tokenizer


def hf_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """What a folder computes in fp32 for ids [b, s], by its own code, as anybody loads it: [b, s, v]."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    with torch.inference_mode():
        return model(ids, use_cache=False).logits


def write_configuration(
    portable: PortableModel, folder: Path, dtype: torch.dtype, eod_id: int | None
) -> None:
    """Write config.json, generation_config.json and the code that they name."""
    ends = {"bos_token_id": eod_id, "eos_token_id": eod_id}
    fields: dict[str, Any] = {
        **exported_fields(portable.model),
        **ends,
        SEQUENCE_LENGTH: portable.sequence_length,
        "tau": portable.taus or None,
        "dtype": dtype,
        "architectures": ["TokenformerForCausalLM"],
        "auto_map": AUTO_MAP,
    }
    configuration_tokenformer.TokenformerConfig(**fields).save_pretrained(folder)
    GenerationConfig(**ends, pad_token_id=eod_id).save_pretrained(folder)
    for module in CODE:
        shutil.copy(str(module.__file__), folder)


def write_weights(
    portable: PortableModel, folder: Path, dtype: torch.dtype, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write safetensors, with an index where there are several; memory holds one of them.

    Raises:
        UserError: the source is damaged.
    """
    with torch.device("meta"):
        meta = {
            exported_name(name): torch.empty(shape, dtype=dtype)
            for name, shape in full_shapes(portable.model).items()
        }
    plan = split_state_dict_into_shards_factory(
        meta,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern=WEIGHTS.replace(".", "{suffix}."),
        max_shard_size=max_shard_bytes,
    )
    shards: dict[str, dict[str, torch.Tensor]] = {}  # one at a time, but for tensors larger than a shard
    for name, tensor in portable.read():
        file = plan.tensor_to_filename[exported_name(name)]
        shard = shards.setdefault(file, {})
        shard[exported_name(name)] = exported(name, tensor).to(dtype)
        if len(shard) == len(plan.filename_to_tensors[file]):
            save_file(shards.pop(file), folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def publish(temporary: Path, folder: Path) -> None:
    """Give a folder its name once all that is in it is on the disk; the place is free, or an empty folder."""
    mode = (temporary / "README.md").stat().st_mode
    for path in temporary.iterdir():
        path.chmod(mode)  # safetensors makes files for their owner alone
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    sync_folder(temporary)
    temporary.replace(folder)
    sync_folder(folder.parent)
