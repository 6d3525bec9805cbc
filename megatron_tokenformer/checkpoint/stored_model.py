"""The run and the model that a checkpoint is of, as its own config tells them."""

from __future__ import annotations

from pathlib import Path

from megatron_tokenformer.checkpoint.manifest import Manifest, read_manifest
from megatron_tokenformer.checkpoint.shards import verify_checkpoint
from megatron_tokenformer.config.load import validate
from megatron_tokenformer.config.schema import Model, RunConfig
from megatron_tokenformer.errors import UserError, printable
from megatron_tokenformer.model.language_model import full_shapes


def check_stored(path: Path, verify: bool = False) -> Manifest:
    """The manifest of a checkpoint that can be used without another config than its own.

    Args:
        verify: read the shards too, and compare their hashes.

    Raises:
        UserError: it is damaged (exit code 1).
    """
    manifest = verify_checkpoint(path) if verify else read_manifest(path)
    stored_config(path, manifest)
    return manifest


def stored_config(path: Path, manifest: Manifest) -> RunConfig:
    """The config of the run that wrote a checkpoint, whose model's tensors are the checkpoint's.

    Raises:
        UserError: they are not, or it is no config, so the checkpoint is damaged (exit code 1).
    """
    try:
        config = validate(RunConfig, manifest.config, "its config")
    except UserError as error:
        raise UserError(f"checkpoint {path} is damaged: {printable(error)}", exit_code=1) from None
    differs = differing_shape(manifest, config.model)
    if differs:
        name, there, here = differs
        raise UserError(
            f"checkpoint {path} is damaged: it has {name} of shape {there}, the model of its own config "
            f"has {here}",
            exit_code=1,
        )
    return config


def differing_shape(
    manifest: Manifest, model: Model
) -> tuple[str, list[int] | None, list[int] | None] | None:
    """The first tensor whose shape is another in a checkpoint than in a model, and both; None if none is."""
    shapes = {name: list(shape) for name, shape in full_shapes(model).items()}
    for name in {**shapes, **manifest.shapes}:
        there, here = manifest.shapes.get(name), shapes.get(name)
        if there != here:
            return name, there, here
    return None
