"""A folder that was exported to Hugging Face, or saved there after training, as a model of ours.

Nothing of the folder is run, and transformers is not needed: config.json and safetensors say all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_tokenformer.checkpoint.portable import PortableModel
from megatron_tokenformer.config.load import validate
from megatron_tokenformer.config.schema import Data, Model, Tokenizer
from megatron_tokenformer.errors import UserError, printable
from megatron_tokenformer.huggingface.names import (
    MODEL_TYPE,
    SEQUENCE_LENGTH,
    WEIGHTS,
    WEIGHTS_INDEX,
    exported,
    exported_name,
    model_fields,
)
from megatron_tokenformer.model.language_model import full_shapes
from megatron_tokenformer.model.tau import ROLES


def read_hf(folder: Path) -> PortableModel:
    """The model of a folder that has config.json and safetensors of ours; its numbers stay in their files.

    Numbers stored in fp32 come back bit for bit, those in 16 bits as fp32 of the same value.

    Raises:
        UserError: it is another kind of model (exit code 2), or its files are damaged (1); says which.
    """
    config = _read_json(folder / "config.json", f"{folder} is no Hugging Face model")
    if config.get("model_type") != MODEL_TYPE:
        raise UserError(
            f"{folder} is a model of type {printable(config.get('model_type'))!r}; only {MODEL_TYPE!r}, "
            f"which --to hf writes, can be read"
        )
    if config.get("tie_word_embeddings") is False:
        raise UserError(
            f"{folder} has an untied head (tie_word_embeddings is false); only tied models can be converted"
        )
    where = str(folder / "config.json")
    model = validate(Model, model_fields(config), where)
    length = validate(Data, {"sequence_length": config.get(SEQUENCE_LENGTH)}, where).sequence_length
    tokenizer = folder.absolute() / "tokenizer.json"
    return PortableModel(
        model,
        length,
        {} if model.is_dense else _taus(config.get("tau"), where),
        _find_tensors(folder, model),
        Tokenizer(type="HFTokenizer", model=str(tokenizer)) if tokenizer.exists() else None,
        origin=str(folder.absolute()),
    )


def _read_json(path: Path, what: str) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{what}: cannot read {path.name} ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}", exit_code=1) from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds {type(tree).__name__}, not an object", exit_code=1)
    return tree


def _taus(stored: object, where: str) -> dict[str, float]:
    taus = stored if isinstance(stored, dict) else {}
    for role in ROLES:
        tau = taus.get(role)
        if not isinstance(tau, int | float) or not 0 < tau < math.inf:
            raise UserError(f"{where}: tau.{role} is {printable(tau)}, not a positive number")
    return {role: float(taus[role]) for role in ROLES}


def _find_tensors(folder: Path, model: Model) -> dict[str, Callable[[], Tensor]]:
    """What reads each tensor, by canonical name, after a look at all names and shapes."""
    there = _shapes(folder)
    readers: dict[str, Callable[[], Tensor]] = {}
    with torch.device("meta"):
        expected = {
            name: tuple(exported(name, torch.empty(shape)).shape)
            for name, shape in full_shapes(model).items()
        }
    for name, shape in expected.items():
        path, found = there.pop(exported_name(name), (None, None))
        if path is None:
            raise UserError(f"{folder} has no tensor {exported_name(name)}", exit_code=1)
        if found != shape:
            raise UserError(
                f"{path} has {exported_name(name)} of shape {list(found or ())}, the model of config.json "
                f"has {list(shape)}",
                exit_code=1,
            )
        readers[name] = partial(_read_tensor, path, name)
    there.pop("lm_head.weight", None)  # the embedding once more
    if there:
        name = min(there)
        raise UserError(
            f"{folder} has a tensor {printable(name)} that the model of config.json has not", exit_code=1
        )
    return readers


def _shapes(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """The file and the shape of each tensor in the folder, by its name there."""
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for path in _files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                found |= {name: (path, tuple(file.get_slice(name).get_shape())) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path} cannot be read as safetensors: {printable(error)}", exit_code=1
            ) from None
    return found


def _files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).exists() or not (folder / WEIGHTS_INDEX).exists():
        return [folder / WEIGHTS]
    index = _read_json(folder / WEIGHTS_INDEX, f"{folder} is damaged").get("weight_map")
    names: list[Any] = [*index.values()] if isinstance(index, dict) else [None]
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UserError(f"{folder / WEIGHTS_INDEX} does not name files of its folder", exit_code=1)
    return [folder / name for name in sorted(set(names))]


def _read_tensor(path: Path, name: str) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            return exported(name, file.get_tensor(exported_name(name)).float())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {printable(error)}", exit_code=1) from None
