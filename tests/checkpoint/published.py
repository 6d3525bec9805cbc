"""Checkpoints in the forms of the published code, and its mathematics written down once more, in fp64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SETTINGS: dict[str, Any] = {
    "pipe_parallel_size": 1,
    "num-layers": 2,
    "hidden_size": 32,
    "num-attention-heads": 4,
    "qkv_slot_num": 12,
    "proj_slot_num": 20,
    "ffn_slot_num": 48,
    "seq-length": 32,
    "pos-emb": "rotary",
    "rotary_pct": 0.5,
    "no-weight-tying": False,
    "norm": "layernorm_nonparam",
    "final_norm": "layernorm",
    "attention_config": [[["tokenformer"], 2]],
    "norm_activation_type": "l2_norm_gelu",
    "train_iters": 143000,
    "tokenizer-type": "HFTokenizer",
    "vocab-file": "./tokenizer.json",
}
VOCABULARY = 64
LOGIT = 16.0
"""the largest one of a random model"""
Weights = dict[str, Tensor]


def settings(**changes: Any) -> dict[str, Any]:
    """The settings with changes; None leaves a key out."""
    changed = {**SETTINGS, **{key.replace("__", "-"): value for key, value in changes.items()}}
    return {key: value for key, value in changed.items() if value is not None}


def write_yaml(path: Path, told: dict[str, Any]) -> Path:
    """As the published files are: JSON with remarks, and Python's words."""
    lines = ",\n".join(f'  "{key}": {_as_yaml(value)}' for key, value in told.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{{\n  # of a test\n{lines}\n}}\n")
    return path


def _as_yaml(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).replace("'", '"')


def published_shapes(told: dict[str, Any], vocabulary: int = VOCABULARY) -> dict[str, tuple[int, ...]]:
    """What a checkpoint of these settings holds."""
    layers, d = told["num-layers"], told["hidden_size"]
    slots = {f"attention.{part}": told["qkv_slot_num"] for part in ("query", "key", "value")}
    slots |= {"attention.proj": told["proj_slot_num"], "mlp": told["ffn_slot_num"]}
    shapes: dict[str, tuple[int, ...]] = {"sequential.0.word_embeddings.weight": (vocabulary, d)}
    for layer in range(layers):
        for part, n in slots.items():
            for kind in ("key", "value"):
                shapes[f"sequential.{layer + 2}.{part}.{kind}_param_tokens"] = (n, d)
    return shapes | {f"sequential.{layers + 3}.norm.{kind}": (d,) for kind in ("weight", "bias")}


def random_weights(told: dict[str, Any], dtype: torch.dtype = torch.float32, seed: int = 0) -> Weights:
    """Weights under which every part matters and the largest logit is LOGIT."""
    generator = torch.Generator().manual_seed(seed)
    weights = {key: torch.randn(shape, generator=generator) for key, shape in published_shapes(told).items()}
    for key, tensor in weights.items():
        if key.endswith("key_param_tokens"):
            tensor /= math.sqrt(tensor.shape[1])  # scores of size 1, so that softmax is not all one token's
        elif key.endswith("value_param_tokens"):
            tensor /= math.sqrt(len(tensor))
    final = f"sequential.{told['num-layers'] + 3}.norm"
    weights[f"{final}.weight"].mul_(0.1).add_(1.0)
    ids = torch.arange(VOCABULARY).view(2, -1)
    scale = LOGIT / reference_logits(weights, told, ids).abs().max().item()
    for kind in ("weight", "bias"):
        weights[f"{final}.{kind}"] *= scale
    return {key: tensor.to(dtype) for key, tensor in weights.items()}


def write_whole(folder: Path, told: dict[str, Any], weights: Weights) -> Path:
    """As published: one file, with its YAML beside it."""
    write_yaml(folder / "model.yml", told)
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


def write_layers(folder: Path, told: dict[str, Any], weights: Weights, step: int = 500) -> Path:
    """As the training code writes them: a file for each module of the pipeline, and the config's copy."""
    place = folder / f"global_step{step}"
    write_yaml(place / "configs/150M.yml", told)
    write_yaml(place / "configs/local_setup.yml", {"vocab-file": told["vocab-file"], "data-path": "data/x"})
    for index in sorted({int(key.split(".")[1]) for key in weights}):
        start = f"sequential.{index}."
        module = {key.removeprefix(start): t for key, t in weights.items() if key.startswith(start)}
        torch.save(module, place / f"layer_{index:02d}-model_00-model_states.pt")
    torch.save({"module": None, "iteration": step}, place / "mp_rank_00_model_states.pt")
    (folder / "latest").write_text(place.name)
    return folder


def reference_logits(weights: Weights, told: dict[str, Any], ids: Tensor) -> Tensor:
    """Logits [b, s, v] of ids [b, s], in fp64."""
    w = {key: tensor.double() for key, tensor in weights.items()}
    layers, heads, kind = told["num-layers"], told["num-attention-heads"], told["norm_activation_type"]
    eps = told.get("layernorm_epsilon", 1e-5)
    embedding = w["sequential.0.word_embeddings.weight"]
    d = embedding.shape[1]
    x = embedding[ids]
    b, s = ids.shape
    rotated = int(d // heads * told["rotary_pct"])

    def pattention(name: str, inputs: Tensor) -> Tensor:
        scores = inputs @ w[f"{name}.key_param_tokens"].T
        return weigh(scores, kind) @ w[f"{name}.value_param_tokens"]

    for layer in range(layers):
        name = f"sequential.{layer + 2}"
        h = F.layer_norm(x, (d,), eps=eps)
        q, k, v = (
            pattention(f"{name}.attention.{part}", h).view(b, s, heads, d // heads).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        q, k = turn(q, rotated), turn(k, rotated)
        scores = q @ k.transpose(-1, -2) / math.sqrt(d // heads)
        scores = scores.masked_fill(torch.ones(s, s).triu(1).bool(), -torch.inf)
        context = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, s, d)
        x = x + pattention(f"{name}.attention.proj", context)
        x = x + pattention(f"{name}.mlp", F.layer_norm(x, (d,), eps=eps))
    final = f"sequential.{layers + 3}.norm"
    return F.layer_norm(x, (d,), w[f"{final}.weight"], w[f"{final}.bias"], eps) @ embedding.T


def weigh(scores: Tensor, kind: str) -> Tensor:
    """From scores over n parameter tokens to their weights."""
    n = scores.shape[-1]
    if kind == "softmax":
        return scores.exp() / scores.exp().sum(-1, keepdim=True) * n
    if kind == "gelu_l2_norm":
        active = F.gelu(scores)
        return active / active.norm(dim=-1, keepdim=True) * math.sqrt(n)
    return F.gelu(scores / scores.norm(dim=-1, keepdim=True) * math.sqrt(n))


def turn(heads: Tensor, size: int) -> Tensor:
    """Rotary embedding of the first `size` channels: channel i turns with channel i + size / 2."""
    half = size // 2
    angle = torch.arange(heads.shape[-2]).double()[:, None] / 10000 ** (torch.arange(half) * 2.0 / size)
    first, second = heads[..., :half], heads[..., half:size]
    turned = (
        first * angle.cos() - second * angle.sin(),
        second * angle.cos() + first * angle.sin(),
        heads[..., size:],
    )
    return torch.cat(turned, dim=-1)
