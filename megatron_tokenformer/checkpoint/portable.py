"""A model outside of any run: what every format of weights has in common, and what conversion goes through.

A reader of a format makes a `PortableModel`, a writer takes one.  Both move one tensor at a time, so that
memory holds the largest tensor and not the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor
from tqdm import tqdm

from megatron_tokenformer.checkpoint import store
from megatron_tokenformer.checkpoint.blocks import read_blocks
from megatron_tokenformer.checkpoint.manifest import WEIGHT, Interval, Manifest
from megatron_tokenformer.checkpoint.shards import BLOCK_ELEMENTS, write_shard
from megatron_tokenformer.checkpoint.step_zero import history_entry, write_whole
from megatron_tokenformer.checkpoint.stored_model import check_stored, stored_config
from megatron_tokenformer.config.schema import Data, Model, RunConfig, Tokenizer
from megatron_tokenformer.config.sizes import parameter_count
from megatron_tokenformer.data.provenance import TokenizerRecord
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.model.language_model import full_shapes
from megatron_tokenformer.model.tau import constant_tau, taus_from_json, taus_to_json

SHARD = "imported.safetensors"


@dataclass(frozen=True)
class PortableModel:
    """A model, with its numbers still where they were found."""

    model: Model
    sequence_length: int
    taus: dict[str, float]
    """by role, as they are now; empty in a dense model"""
    tensors: Mapping[str, Callable[[], Tensor]]
    """by canonical name (all of `full_shapes`), what reads that tensor: whole, fp32, on the CPU, of the shape
    that `full_shapes` says.  May raise UserError: the file is damaged"""
    tokenizer: Tokenizer | None = None
    """as a config names it, where known; its files may not be here, or be others than they were"""
    made_with: TokenizerRecord | None = None
    """what the data was made with, by its hash; None where nothing tells"""
    origin: str = field(default="unknown", compare=False)
    """where it was read from, for the history of what is made of it"""

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors by canonical name, in the order of the model, one in memory at a time.

        Raises:
            UserError: a file is damaged.
        """
        for name in tqdm(full_shapes(self.model), unit="tensor", desc="weights", disable=None):
            yield name, self.tensors[name]()

    def rounded(self, dtype: torch.dtype) -> PortableModel:
        """The same with the numbers that remain of it in `dtype`, in fp32."""

        def read(name: str) -> Tensor:
            return self.tensors[name]().to(dtype).float()

        return replace(self, tensors={name: partial(read, name) for name in self.tensors})


def read_native(load: str | Path) -> PortableModel:
    """The model of a checkpoint of any layout, with tau as of its step.

    Args:
        load: a checkpoint, a folder of them, or a run's (then the newest good one).

    Raises:
        UserError: there is none, or all are damaged.
    """
    path, manifest = store.first_good(store.find_checkpoints(load), check_stored)
    config = stored_config(path, manifest)
    return PortableModel(
        config.model,
        config.data.sequence_length,
        {role: tau.at(manifest.step) for role, tau in taus_from_json(manifest.taus).items()},
        {name: partial(_read_tensor, path, manifest, name) for name in manifest.shapes},
        config.data.tokenizer or _configured(manifest.tokenizer),
        manifest.tokenizer,
        str(path.absolute()),
    )


def _read_tensor(path: Path, manifest: Manifest, name: str) -> Tensor:
    shape = manifest.shapes[name]
    tensor = torch.empty(math.prod(shape))
    for first, values in read_blocks(path, manifest, name, WEIGHT, BLOCK_ELEMENTS):
        tensor[first : first + len(values)] = values
    return tensor.view(shape)


def _configured(record: TokenizerRecord | None) -> Tokenizer | None:
    """A tokenizer as a config names it; None if a config cannot."""
    if record is None:
        return None
    try:
        told = {key: getattr(record, key) for key in Tokenizer.model_fields}
        return Tokenizer.model_validate(told)
    except ValidationError:
        return None


def write_native(portable: PortableModel, folder: Path) -> Path:
    """Write a model as a checkpoint at step 0 of a run that has not begun, and return its path.

    Such a checkpoint has weights without an optimizer's state: whoever trains on starts Adam anew.  It is
    complete or not there; beside it `latest` names it.

    Raises:
        UserError: the folder holds something already, there is no room, the folder cannot be written, or the
            source is damaged; nothing new is then there.
    """
    check_new(folder)
    model = portable.model
    shapes = full_shapes(model)
    intervals = [Interval(name, 0, math.prod(shape)) for name, shape in shapes.items()]
    data = Data(sequence_length=portable.sequence_length, tokenizer=portable.tokenizer)

    def write(temporary: Path) -> Manifest:
        tensors = (_of_shape(name, tensor, shapes[name]) for name, tensor in portable.read())
        shard = write_shard(temporary / SHARD, intervals, [WEIGHT], tensors)
        return Manifest(
            config=RunConfig(model=model, data=data).model_dump(mode="json"),
            step=0,
            position=0,
            adam_step=0,
            taus=taus_to_json({role: constant_tau(tau) for role, tau in portable.taus.items()}),
            shapes={name: list(shape) for name, shape in shapes.items()},
            states=[WEIGHT],
            shards=[shard],
            history=[history_entry("import", portable.origin)],
            tokenizer=portable.made_with,
        )

    path, _ = write_whole(folder, f"write a checkpoint into {folder}", 4 * parameter_count(model), write)
    return path


def check_new(folder: Path) -> None:
    """Refuse to write a model into a folder that holds anything but what an interrupted write left.

    Raises:
        UserError: names the folder, and what is there.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder that is new or empty")
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    found.discard(store.temporary_name(0))
    if found:
        raise UserError(f"{folder} holds {min(found)} already; give a folder that is new or empty")


def _of_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tensor.shape != shape or tensor.dtype != torch.float32:
        found = f"{list(tensor.shape)} in {tensor.dtype}"
        raise ValueError(f"a reader gave {name} of {found}, the model has {list(shape)} in fp32")
    return tensor
