"""Checkpoints of the published Tokenformers, and of the training code that made them (a GPT-NeoX).

Three forms of the same tensors, one to a module of a sequence: 0 the embedding, 2 to L + 1 the layers, L + 3
the final norm (the others have no parameters; the head is the embedding again).

    DIR/pytorch_model.bin                            sequential.2.attention.query.key_param_tokens, ...
    DIR/global_step9/layer_02-model_00-model_states.pt            attention.query.key_param_tokens, ...
    DIR/global_step9/mp_rank_00_model_states.pt      module: the keys of a pytorch_model.bin, if the code ran
                                                     without a pipeline and so wrote no files of layers

There the factor of normalised scores is sqrt(n), under softmax n: tau = sqrt(n) here, in all three cases.
The gain of the final norm is stored minus one here.  Weights in 16 bits become fp32.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_tokenformer.checkpoint.manifest import read_small
from megatron_tokenformer.checkpoint.neox import (
    Settings,
    model_of,
    read_settings,
    sequence_length_of,
    tokenizer_of,
)
from megatron_tokenformer.checkpoint.pickled import read_tensors
from megatron_tokenformer.checkpoint.portable import PortableModel
from megatron_tokenformer.config.schema import Model
from megatron_tokenformer.errors import UserError, printable
from megatron_tokenformer.model.language_model import full_shapes
from megatron_tokenformer.model.names import is_key, is_token
from megatron_tokenformer.model.tau import initial_taus

WHOLE, MODULE = "pytorch_model.bin", "mp_rank_00_model_states.pt"
EMBEDDING = "sequential.0.word_embeddings.weight"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LAYER = re.compile(r"layer_(\d{2,5})-model_(\d{2,5})-model_states\.pt")
_STEP = re.compile(r"global_step(\d{1,18})")
_PART_NAMES = {"output": "proj", "ffn": "mlp"}
"""parts of canonical names that are called otherwise there"""
_BUFFERS = re.compile(r"sequential\.\d+\.attention\.(rotary_emb\.inv_freq|bias|masked_bias)")
"""tables that follow from the config, and are no weights"""


@dataclass(frozen=True)
class Stored:
    """A tensor, and the file that it is in."""

    tensor: Tensor
    file: Path


def read_official(load: str | Path, yaml: Sequence[Path] = ()) -> PortableModel:
    """The model of a published checkpoint, or of one that the published training code has written.

    Args:
        load: the folder with pytorch_model.bin, that file, a folder of DeepSpeed's checkpoints (then what
            `latest` names, or the last), or one of these.
        yaml: the model's config files; by default those beside the weights.

    Raises:
        UserError: no such checkpoint, a damaged or dangerous file, no config, or tensors that are not those
            of the config's model; names the file and the key.
    """
    load = Path(load)
    source = load if load.is_file() else find_folder(load)
    stored = read_stored(source)
    folder = source.parent if source.is_file() else source
    settings = read_settings(yaml or find_yaml(folder))
    if EMBEDDING not in stored:
        raise UserError(f"{source} lacks {EMBEDDING}: it is no checkpoint of a published Tokenformer", 1)
    model = model_of(settings, _vocab_size(stored[EMBEDDING], settings))
    keys = {name: official_key(name, model.layers) for name in full_shapes(model)}
    _check_tensors(stored, keys, model, settings)
    return PortableModel(
        model,
        sequence_length_of(settings),
        {role: tau.end for role, tau in initial_taus(model).items()},
        {name: partial(_read, name, stored[key].tensor) for name, key in keys.items()},
        tokenizer_of(settings, folder),
        origin=str(source.absolute()),
    )


def official_key(name: str, layers: int) -> str:
    """What a parameter with this canonical name is called in a published checkpoint."""
    if name == "embedding.weight":
        return EMBEDDING
    if not is_token(name):
        return f"sequential.{layers + 3}.norm.{'bias' if name.endswith('.bias') else 'weight'}"
    _, layer, *parts, _ = name.split(".")
    inner = ".".join(_PART_NAMES.get(part, part) for part in parts)
    return f"sequential.{int(layer) + 2}.{inner}.{'key' if is_key(name) else 'value'}_param_tokens"


def _read(name: str, tensor: Tensor) -> Tensor:
    tensor = tensor.detach().to(torch.float32)
    return tensor - 1.0 if name.endswith(".gain_minus_one") else tensor.contiguous()


def find_folder(load: Path) -> Path:
    """The folder that holds the weights: `load`, or the checkpoint in it that `latest` names, or the last.

    Raises:
        UserError: there is none.
    """
    if _weight_files(load):
        return load
    steps = {
        int(match[1]): path
        for path in (load.iterdir() if load.is_dir() else ())
        if (match := _STEP.fullmatch(path.name)) and _weight_files(path)
    }
    try:
        latest = load / read_small(load / "latest", 64).decode("ascii").strip()
    except (OSError, ValueError):
        latest = None
    if latest is not None and latest in steps.values():
        return latest
    if not steps:
        raise UserError(
            f"no published checkpoint at {load}: no {WHOLE}, and no layer_*-model_00-model_states.pt there "
            f"or in a global_step* folder"
        )
    return steps[max(steps)]


def _weight_files(folder: Path) -> list[Path]:
    """The files of one of the three forms, the first that is there."""
    if not folder.is_dir():
        return []
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    layers = sorted(path for path in folder.iterdir() if _LAYER.fullmatch(path.name))
    return layers or [path for path in (folder / MODULE,) if path.is_file()]


def read_stored(source: Path) -> dict[str, Stored]:
    """All tensors by their keys in a pytorch_model.bin, whichever form they are in.

    Args:
        source: a file of tensors, or a folder that holds one of the forms.

    Raises:
        UserError: a file is damaged or dangerous, or the model was split over ranks.
    """
    stored: dict[str, Stored] = {}
    for file in [source] if source.is_file() else _weight_files(source):
        layer = _LAYER.fullmatch(file.name)
        if layer and int(layer[2]) > 0:
            raise UserError(
                f"{file} is of a second tensor-parallel rank, on which a Tokenformer of the published code "
                f"cannot have run; only model_00 can be converted"
            )
        prefix = f"sequential.{int(layer[1])}." if layer else ""
        part = "module" if file.name == MODULE else None
        for key, tensor in read_tensors(file, part).items():
            stored[prefix + key] = Stored(tensor, file)
    return stored


def find_yaml(folder: Path) -> list[Path]:
    """The config files that belong to weights in a folder: those that the training code saved, or beside it.

    Raises:
        UserError: there are none.
    """
    for place in (folder / "configs", folder, *([folder.parent] if _STEP.fullmatch(folder.name) else [])):
        found = sorted({*place.glob("*.yml"), *place.glob("*.yaml")})
        if found:
            return found
    raise UserError(
        f"no .yml beside the weights in {folder}, and they do not tell heads, rotary embedding and norms; "
        f"give the YAML that the model was trained or evaluated with, --yaml FILE"
    )


def _vocab_size(embedding: Stored, settings: Settings) -> int:
    rows = len(embedding.tensor) if embedding.tensor.dim() else 0
    told = settings.values.get("padded_vocab_size", rows)
    if told != rows:
        says = f"{settings.source} says padded_vocab_size={printable(told)}"
        raise UserError(f"{EMBEDDING} in {embedding.file} has {rows} rows; {says}", exit_code=1)
    return rows


def _check_tensors(stored: dict[str, Stored], keys: dict[str, str], model: Model, settings: Settings) -> None:
    """Every tensor of the model is there, of its shape, and no other that would change the function."""
    sizes = settings.told("num_layers", "hidden_size", "qkv_slot_num", "proj_slot_num", "ffn_slot_num")
    for name, shape in full_shapes(model).items():
        found = stored.get(keys[name])
        if found is None:
            raise UserError(
                f"the checkpoint lacks {keys[name]}, which a model has by {settings.source} ({sizes})", 1
            )
        if found.tensor.shape != shape:
            raise UserError(
                f"{keys[name]} in {found.file} is of shape {list(found.tensor.shape)}, by {settings.source} "
                f"it is {list(shape)} ({sizes})",
                exit_code=1,
            )
        if found.tensor.is_meta:
            raise UserError(f"{keys[name]} in {found.file} is a meta tensor, which has no values", 1)
        if found.tensor.dtype not in DTYPES or found.tensor.layout != torch.strided:
            raise UserError(f"{keys[name]} in {found.file} is {found.tensor.dtype}, no weights", exit_code=1)
    _check_others(stored, stored.keys() - set(keys.values()), model, sizes)


def _check_others(stored: dict[str, Stored], others: set[str], model: Model, sizes: str) -> None:
    """Of what the model does not have, pass over copies and tables that are known, and refuse the rest."""
    head = f"sequential.{model.layers + 4}"
    passed_over = {key for key in others if _BUFFERS.fullmatch(key)}
    for key in sorted(others - passed_over):
        place = f"{printable(key)} in {stored[key].file}"
        if key.startswith(f"{head}.final_linear."):
            raise UserError(f"{place} is an untied head; only tied models can be converted", exit_code=1)
        copy = key == f"{head}.word_embeddings.weight"
        if not copy:
            raise UserError(f"{place} belongs to no part of the config's model ({sizes})", exit_code=1)
        if stored[key].tensor.is_meta or not torch.equal(stored[key].tensor, stored[EMBEDDING].tensor):
            raise UserError(f"{place} is not {EMBEDDING}; only tied models can be converted", exit_code=1)
        passed_over.add(key)
    if passed_over:
        kinds = sorted({re.sub(r"^sequential\.\d+\.", "", key) for key in passed_over})
        print(f"note: passed over {len(passed_over)} tensors that are no weights: {', '.join(kinds)}")
