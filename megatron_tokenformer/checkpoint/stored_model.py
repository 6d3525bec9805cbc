"""The model that a checkpoint is of."""

from __future__ import annotations

from pathlib import Path

from megatron_tokenformer.checkpoint.manifest import Manifest
from megatron_tokenformer.config.load import validate
from megatron_tokenformer.config.schema import Model
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.model.language_model import full_shapes


def stored_model(path: Path, manifest: Manifest) -> Model:
    """The model in the config of a checkpoint, whose tensors are the checkpoint's.

    Raises:
        UserError: they are not, so one of them is damaged.
    """
    model = validate(Model, manifest.config.get("model", {}), str(path))
    shapes = {name: list(shape) for name, shape in full_shapes(model).items()}
    for name in {**shapes, **manifest.shapes}:
        there, here = manifest.shapes.get(name), shapes.get(name)
        if there != here:
            raise UserError(
                f"checkpoint {path} is damaged: it has {name} of shape {there}, the model of its own config "
                f"has {here}",
                exit_code=1,
            )
    return model
