"""A checkpoint of any layout as one whole model in one process, on one device."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from megatron_tokenformer.checkpoint.blocks import read_blocks
from megatron_tokenformer.checkpoint.manifest import WEIGHT, Manifest
from megatron_tokenformer.checkpoint.portable import PortableModel
from megatron_tokenformer.checkpoint.shards import BLOCK_ELEMENTS
from megatron_tokenformer.checkpoint.stored_model import stored_config
from megatron_tokenformer.config.schema import Model, Precision, resolve_precision
from megatron_tokenformer.model.language_model import LanguageModel
from megatron_tokenformer.model.tau import constant_tau, set_taus, taus_from_json

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def one_device() -> torch.device:
    """The GPU of a process that is alone, or the CPU if there is none or DS_ACCELERATOR=cpu says so."""
    gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    return torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")


@torch.no_grad()
def load_model(path: Path, manifest: Manifest, precision: Precision, device: torch.device) -> LanguageModel:
    """The model of a checkpoint with tau as of its step, its weights in this precision.

    Weights go from the files to their place block by block: beyond the model itself, one block is in memory.

    Raises:
        UserError: the tensors are not those of the config's model, or a shard is not what the manifest says.
    """
    model = empty_model(stored_config(path, manifest).model, precision, device)
    for name, parameter in model.named_parameters():
        for first, values in read_blocks(path, manifest, name, WEIGHT, BLOCK_ELEMENTS):
            parameter.view(-1)[first : first + len(values)].copy_(values)
    set_taus(model, taus_from_json(manifest.taus), manifest.step)
    return model


@torch.no_grad()
def assemble(portable: PortableModel, device: torch.device) -> LanguageModel:
    """A model outside of any run as one module in fp32, tensor by tensor.

    Raises:
        UserError: a file that it is read from is damaged.
    """
    model = empty_model(portable.model, "fp32", device)
    parameters = dict(model.named_parameters())
    for name, tensor in portable.read():
        parameters[name].copy_(tensor)
    set_taus(model, {role: constant_tau(tau) for role, tau in portable.taus.items()}, step=0)
    return model


def empty_model(model: Model, precision: Precision, device: torch.device) -> LanguageModel:
    """A model to compute with, whose parameters have no values yet."""
    with torch.device("meta"):  # nothing is initialised only to be overwritten
        module = LanguageModel(model)
    module = module.to(DTYPES[resolve_precision(precision, device.type)]).to_empty(device=device)
    return module.requires_grad_(False).eval()
