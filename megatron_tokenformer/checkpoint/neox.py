"""The configuration of the published training code, a GPT-NeoX YAML, as a model of ours.

It says more than we have a choice of.  What would make another function of the same weights is refused by
name; what is of a run and not of its model is passed over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tokenformer.config.load import read_yaml, validate
from megatron_tokenformer.config.schema import Data, Model, Tokenizer
from megatron_tokenformer.errors import UserError, printable

SIZES = {
    "num_layers": "layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "attention_heads",
    "qkv_slot_num": "tokens.qkv",
    "proj_slot_num": "tokens.output",
    "ffn_slot_num": "tokens.ffn",
}
"""what must be given, and what it is called here"""

CHOICES = {"norm_activation_type": "l2_norm_gelu", "rotary_pct": 1.0, "layernorm_epsilon": 1e-5}
"""what may be left out, and what it then is there"""

FIXED: dict[str, tuple[Any, Any]] = {
    "norm": ("layernorm_nonparam", "layernorm"),
    "final_norm": ("layernorm", None),
    "pos_emb": ("rotary", "learned"),
    "rotary_emb_base": (10000, 10000),
    "no_weight_tying": (False, False),
    "gpt_j_residual": (False, False),
    "use_mup": (False, False),
    "sliding_window_width": (None, None),
    "soft_prompt_tuning": (None, None),
    "transformer_increase_dim": (0, 0),
    "model_parallel_size": (1, 1),
}
"""what our Tokenformer has no choice of: its value, and what it is there when left out"""

TOLD = ("seq_length", "max_position_embeddings", "tokenizer_type", "vocab_file", "merge_file")
KEYS = {*SIZES, *CHOICES, *FIXED, *TOLD, "attention_config", "padded_vocab_size"}
"""all that is looked at"""

TOKENIZERS = {
    "HFTokenizer": "HFTokenizer",
    "GPT2BPETokenizer": "GPT2BPETokenizer",
    "SPMTokenizer": "SentencePieceTokenizer",
}
"""names there and here"""


@dataclass(frozen=True)
class Settings:
    """What one or several YAML files of a model say."""

    values: dict[str, Any]
    """by key, words joined by _"""
    source: str
    """the files, for messages"""

    def told(self, *keys: str) -> str:
        """Some keys with their values, for messages."""
        return ", ".join(f"{key}={printable(self.values[key])}" for key in keys if key in self.values)


def read_settings(paths: Sequence[Path]) -> Settings:
    """Read YAML files, whose keys may be written with - or _, and which must not contradict each other.

    Raises:
        UserError: a file cannot be read, is not YAML, or says something else than another about the model.
    """
    values: dict[str, Any] = {}
    origins: dict[str, Path] = {}
    for path in paths:
        for written, value in read_yaml(path).items():
            key = str(written).replace("-", "_")
            value = None if value == "None" else value  # Python's, which YAML takes for text
            if key in KEYS and key in values and values[key] != value:
                here, there = (f"{key}={printable(found)}" for found in (value, values[key]))
                raise UserError(f"{path} says {here}, {origins[key]} {there}; name the right one with --yaml")
            values[key], origins[key] = value, path
    return Settings(values, " + ".join(str(path) for path in paths))


def model_of(settings: Settings, vocab_size: int) -> Model:
    """The model that the settings describe.

    Args:
        vocab_size: rows of the embedding; the settings do not tell how it was padded.

    Raises:
        UserError: a size is missing, a value is no size, or the model is none that we have; names the key.
    """
    values, source = settings.values, settings.source
    missing = [key for key in SIZES if values.get(key) is None]
    if missing:
        raise UserError(f"{source} does not say {', '.join(missing)}; it is no config of a Tokenformer")
    _check_fixed(settings)
    chosen = {key: values.get(key, default) for key, default in CHOICES.items()}
    tree: dict[str, Any] = {
        "architecture": "tokenformer",
        "tokens": {},
        "vocab_size": vocab_size,
        "score_norm": chosen["norm_activation_type"],
        "rotary_fraction": chosen["rotary_pct"],
        "layer_norm_eps": chosen["layernorm_epsilon"],
    }
    for key, name in SIZES.items():
        section, _, leaf = name.rpartition(".")
        (tree[section] if section else tree)[leaf] = values[key]
    model = validate(Model, tree, source)
    rotated = int(model.head_size * model.rotary_fraction)
    if rotated != model.rotary_size:
        raise UserError(
            f"{source}: rotary_pct={model.rotary_fraction:g} rotates {rotated} of a head's {model.head_size} "
            f"channels, which must be an even number"
        )
    return model


def _check_fixed(settings: Settings) -> None:
    """Refuse a model that is another function of its weights than ours."""
    for key, (ours, default) in FIXED.items():
        there = settings.values.get(key, default)
        if there != ours:
            left_out = "" if key in settings.values else " (its value when left out)"
            raise UserError(
                f"{settings.source}: {key} is {printable(there)}{left_out}; only models with {key}={ours} "
                f"can be converted"
            )
    kinds = set(_texts(settings.values.get("attention_config"))) - {"tokenformer"}
    if kinds:
        raise UserError(
            f"{settings.source}: attention_config has layers of kind {printable(min(kinds))}; only models "
            f"whose layers are all of kind tokenformer can be converted"
        )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def sequence_length_of(settings: Settings) -> int:
    """Tokens in a training window.

    Raises:
        UserError: none is told, or it is no length.
    """
    told = settings.values.get("seq_length") or settings.values.get("max_position_embeddings")
    if told is None:
        raise UserError(f"{settings.source} does not say seq_length")
    return validate(Data, {"sequence_length": told}, settings.source).sequence_length


def tokenizer_of(settings: Settings, folder: Path) -> Tokenizer | None:
    """The tokenizer that made the data; None if the settings tell none that we have.

    Args:
        folder: where its files are looked for first; those that are not there keep the path that is told.
    """
    kind = TOKENIZERS.get(str(settings.values.get("tokenizer_type")))
    if kind is None:
        return None

    def find(key: str) -> str | None:
        told = settings.values.get(key)
        if not isinstance(told, str):
            return None
        beside = folder / Path(told).name
        return str(beside.absolute()) if beside.is_file() else told

    tree = {"type": kind, "model": find("vocab_file"), "merges": find("merge_file")}
    return validate(Tokenizer, tree, settings.source)
