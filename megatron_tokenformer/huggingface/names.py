"""What the project and an exported folder call the same things, in both directions.

A tensor has its canonical name inside `model.`, but that a dense layer's MLP is its `ffn`; and what the
project stores transposed (every parameter splits on its rows) is there the weight of a usual linear layer.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron_tokenformer.config.schema import Model

MODEL_TYPE = "tokenformer"
FIELDS = {
    "architecture": "architecture",
    "layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "attention_heads": "num_attention_heads",
    "tokens": "tokens",
    "score_norm": "score_norm",
    "vocab_size": "vocab_size",
    "rotary_fraction": "rotary_fraction",
    "layer_norm_eps": "layer_norm_eps",
}
"""keys of `config.schema.Model`, and what config.json calls them"""
SEQUENCE_LENGTH = "max_position_embeddings"
PREFIX = "model."
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
TRANSPOSED = (".attention.output.weight", ".mlp.down.weight")


def exported_name(name: str) -> str:
    """What an exported folder calls the tensor of this canonical name."""
    return PREFIX + name.replace(".mlp.", ".ffn.").replace(".mlp_norm.", ".ffn_norm.")


def exported(name: str, tensor: Tensor) -> Tensor:
    """A tensor as the exported folder has it; applied twice, it is as before."""
    return tensor.t().contiguous() if name.endswith(TRANSPOSED) else tensor


def exported_fields(model: Model) -> dict[str, Any]:
    """The model as fields of config.json; a dense one has neither tokens nor a score norm."""
    tree = model.model_dump(mode="json")
    return {there: tree.get(here) for here, there in FIELDS.items()}


def model_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The inverse, for validation: the fields that config.json has."""
    return {here: config[there] for here, there in FIELDS.items() if config.get(there) is not None}
