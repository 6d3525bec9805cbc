"""A checkpoint of any layout as one whole model in one process, on one device."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_tokenformer.checkpoint.blocks import read_blocks
from megatron_tokenformer.checkpoint.manifest import WEIGHT, Manifest
from megatron_tokenformer.checkpoint.portable import PortableModel
from megatron_tokenformer.checkpoint.shards import BLOCK_ELEMENTS
from megatron_tokenformer.checkpoint.store import find_checkpoints, first_good
from megatron_tokenformer.checkpoint.stored_model import check_stored, stored_config
from megatron_tokenformer.config import schema
from megatron_tokenformer.config.schema import Model, Precision, RunConfig, resolve_precision
from megatron_tokenformer.data.provenance import TokenizerRecord, named
from megatron_tokenformer.data.tokenizers import Tokenizer, load_tokenizer
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.model.language_model import LanguageModel
from megatron_tokenformer.model.tau import constant_tau, set_taus, taus_from_json

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Stored:
    """A checkpoint that was found to be in order."""

    path: Path
    manifest: Manifest
    config: RunConfig


def open_checkpoint(load: str | Path, verify: bool = False) -> Stored:
    """What `--load` means: one checkpoint, or the newest good one of a folder of them, or of a run's.

    Args:
        verify: read the whole checkpoint first, and compare its hashes.

    Raises:
        UserError: no checkpoint there, or a damaged one.
    """
    path, manifest = first_good(find_checkpoints(load), lambda found: check_stored(found, verify))
    return Stored(path, manifest, stored_config(path, manifest))


def checkpoint_tokenizer(stored: Stored, model: str | None = None) -> Tokenizer:
    """The tokenizer that a checkpoint's ids are of.

    Args:
        model: the tokenizer's file, where it is no longer where the checkpoint says.

    Raises:
        UserError: see `open_tokenizer`.
    """
    try:
        config = stored.config
        return open_tokenizer(
            config.data.tokenizer, config.model.vocab_size, stored.manifest.tokenizer, model
        )
    except UserError as error:
        raise UserError(f"checkpoint {stored.path}: {error}", error.exit_code) from None


def open_tokenizer(
    configured: schema.Tokenizer | None,
    vocab_size: int,
    made_with: TokenizerRecord | None,
    model: str | None = None,
) -> Tokenizer:
    """The tokenizer of a run: its config's, or what the description of its data tells.

    Args:
        configured: the config's; None if it names none.
        vocab_size: rows of the model's embedding.
        made_with: what made the data; None if unknown.
        model: the tokenizer's file, where it is no longer where it was.

    Raises:
        UserError: nothing tells it, its file is not there or another one, or it has more ids than the model.
    """
    told = configured or made_with
    if told is None:
        raise UserError(
            "nothing tells the tokenizer: the config has no data.tokenizer, and the data had no description; "
            "train with data.tokenizer.type and data.tokenizer.model"
        )
    file = model or told.model
    try:
        tokenizer = load_tokenizer(told.type, file, merges=told.merges, pattern=told.pattern)
    except UserError as error:
        raise UserError(f"{error}; --tokenizer-model FILE tells where it is now", error.exit_code) from None
    if made_with is not None and tokenizer.fingerprint != made_with.fingerprint:
        name = named(file or told.type, tokenizer.fingerprint)
        raise UserError(f"it was trained on data made with {made_with}, not with {name}")
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{file or told.type} has {tokenizer.vocab_size} token ids, but model.vocab_size is {vocab_size}"
        )
    return tokenizer


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
