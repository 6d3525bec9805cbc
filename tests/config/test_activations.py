"""The estimate of activations against what running layers hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_tokenformer.config.activations import backward_at_work, document_mask, layer_activations, logits
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.config.sizes import CHUNK_SCORES
from megatron_tokenformer.kernels import eager
from megatron_tokenformer.model import pattention
from megatron_tokenformer.model.ends import Embedding, FinalNorm
from megatron_tokenformer.model.pipeline import language_model_loss
from megatron_tokenformer.model.tokenformer import TokenformerLayer
from megatron_tokenformer.model.transformer import TransformerLayer
from megatron_tokenformer.parallel.layout import Layout
from megatron_tokenformer.training.engine import build_engine
from tests.measuring import LiveOnRanks, allocated, held
from tests.ranks import run_ranks
from tests.toy import DENSE, toy_config

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LAYOUTS = pytest.mark.parametrize("tensor, sequence", [(1, False), (2, False), (2, True)])
POLICIES_AT_WORK = pytest.mark.parametrize(
    "recompute, chunk",
    [("none", CHUNK_SCORES), ("scores", CHUNK_SCORES), ("scores", 1)],
    ids=["none", "scores", "scores in two chunks"],  # of 128 rows
)


def new_layer(
    layout: Layout, config: RunConfig
) -> tuple[TokenformerLayer | TransformerLayer, Tensor, Tensor | None]:
    """A layer, and what it gets on this rank: vectors, and where documents are isolated places in them."""
    dtype, ranks = DTYPES[config.training.precision], layout.tensor
    layer = (
        TransformerLayer(config.model, ranks, 0)
        if config.model.architecture == "transformer"
        else TokenformerLayer(config.model, ranks, 0, config.training.recompute == "scores")
    )
    batch, whole = config.training.micro_batch_size, config.data.sequence_length
    length = whole // (ranks.size if ranks.sequence else 1)
    x = torch.randn(length, batch, config.model.hidden_size, dtype=dtype, requires_grad=True)
    places = torch.arange(whole).expand(batch, whole) if config.data.isolate_documents else None
    return layer.to(dtype), x, places


def saved_by_layer(layout: Layout, config: RunConfig) -> int:
    layer, x, places = new_layer(layout, config)
    layer(x, places)  # makes the tables of the rotary embedding, once and for all
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda t: t):
        layer(x, places)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    tables = [t for t in saved if t.shape == (config.data.sequence_length, config.model.rotary_size)]
    return held(t for t in saved if t.untyped_storage().data_ptr() not in parameters) - held(tables)


def layer_config(
    folder: Path,
    precision: str,
    tokens: int | None,
    parallel: dict[str, Any],
    recompute: str,
    ffn: int = 4,
    score_norm: str = "l2_norm_gelu",
    isolate: bool = False,
) -> RunConfig:
    """A wide layer of this many tokens, or of None: a dense one."""
    counts = {"qkv": tokens, "output": tokens, "ffn": ffn * (tokens or 0)}
    of_tokens = {"tokens": counts, "score_norm": score_norm}
    return toy_config(
        folder,
        model={"hidden_size": 64, **(DENSE if tokens is None else of_tokens)},
        parallel=parallel,
        data={"sequence_length": 128, "isolate_documents": isolate},
        training={"precision": precision, "micro_batch_size": 2, "recompute": recompute},
    )


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@LAYOUTS
@pytest.mark.parametrize("tokens", [64, 512])
@pytest.mark.parametrize("recompute", ["none", "scores"])
def test_activations_are_what_layers_save(
    tmp_path: Path, precision: str, tensor: int, sequence: bool, tokens: int, recompute: str
) -> None:
    """Within 1 %."""
    parallel = {"tensor": tensor, "sequence": sequence}
    config = layer_config(tmp_path, precision, tokens, parallel, recompute)
    for saved in run_ranks(tensor, saved_by_layer, config, **parallel):
        assert layer_activations(config, recompute) == pytest.approx(saved, rel=0.01)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@LAYOUTS
def test_activations_of_a_dense_layer_are_what_it_saves(
    tmp_path: Path, precision: str, tensor: int, sequence: bool
) -> None:
    """Within 1 %."""
    parallel = {"tensor": tensor, "sequence": sequence}
    config = layer_config(tmp_path, precision, None, parallel, "none")
    for saved in run_ranks(tensor, saved_by_layer, config, **parallel):
        assert layer_activations(config, "none") == pytest.approx(saved, rel=0.01)


def saved_by_two_layers(layout: Layout, config: RunConfig) -> int:
    """One mask, besides what the two save of documents that are not isolated."""
    layer, x, places = new_layer(layout, config)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda t: t):
        layer(layer(x, places), places)
    batch, length = places.shape
    return held(t for t in saved if t.shape[-2:] == (length, length) or t.numel() == batch * length**2)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("tokens", [64, None], ids=["tokenformer", "dense"])
def test_layers_share_the_mask_of_isolated_documents(
    tmp_path: Path, precision: str, tokens: int | None
) -> None:
    config = layer_config(tmp_path, precision, tokens, {}, "none", isolate=True)
    assert run_ranks(1, saved_by_two_layers, config) == [document_mask(config)]


def test_softmax_saves_a_maximum_of_each_row_as_well(tmp_path: Path) -> None:
    config = layer_config(tmp_path, "bf16", 64, {}, "scores", score_norm="softmax")
    (saved,) = run_ranks(1, saved_by_layer, config)
    assert layer_activations(config, "scores") == pytest.approx(saved, rel=0.001)


def allocated_by_layer(layout: Layout, config: RunConfig) -> int:
    """As the engine would call the layer."""
    layer, x, places = new_layer(layout, config)
    checkpoint = build_engine(config, layout, accumulation=4).deepspeed.module.activation_checkpoint_func
    checkpointed = config.training.recompute == "layer"
    layer(x, places)
    outputs: list[Tensor] = []
    after, _ = allocated(
        lambda: outputs.append(checkpoint(layer, x, places) if checkpointed else layer(x, places)) or outputs
    )
    # A checkpointed layer keeps two states of the random number generator, whatever the layer's size.
    return after - outputs[0].nbytes + x.nbytes - checkpointed * 2 * torch.get_rng_state().nbytes


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("recompute", ["none", "scores", "layer"])
def test_policies_keep_what_is_said(tmp_path: Path, precision: str, recompute: str) -> None:
    """Within 3 %, by the allocator: what is there after a forward pass and was not before."""
    config = layer_config(tmp_path, precision, 256, {}, recompute)
    (kept,) = run_ranks(1, allocated_by_layer, config)
    assert layer_activations(config, recompute) == pytest.approx(kept, rel=0.03)


def most_of_a_layer(layout: Layout, config: RunConfig, chunk_scores: int) -> int:
    """At its fullest, forward and backward: between operations, so without what they use inside."""
    eager.CACHED = 1 << 12  # a few rows: a GPU has no blocks
    whole = pattention.pattend
    pattention.pattend = lambda *arguments: whole(*arguments, chunk_scores=chunk_scores)
    layer, x, places = new_layer(layout, config)
    leaves = x, *layer.parameters()
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf)
    layer(x, places)
    with LiveOnRanks([*leaves, *(leaf.grad for leaf in leaves)]) as live:
        output = layer(x, places)
        output.backward(torch.zeros_like(output))
    return live.peak + x.nbytes


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@LAYOUTS
@POLICIES_AT_WORK
def test_a_layer_at_work_takes_what_is_said(
    tmp_path: Path, precision: str, tensor: int, sequence: bool, recompute: str, chunk: int
) -> None:
    """Within 1 %, on every rank."""
    parallel = {"tensor": tensor, "sequence": sequence}
    expected, ranks = estimated_and_measured(tmp_path, precision, parallel, 4, recompute, chunk)
    assert ranks == pytest.approx([expected] * tensor, rel=0.01)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@LAYOUTS
def test_a_dense_layer_at_work_takes_what_is_said(
    tmp_path: Path, precision: str, tensor: int, sequence: bool
) -> None:
    """Within 1 %, on every rank."""
    parallel = {"tensor": tensor, "sequence": sequence}
    config = layer_config(tmp_path, precision, None, parallel, "none")
    expected = layer_activations(config, "none") + backward_at_work(config, "none")
    ranks = run_ranks(tensor, most_of_a_layer, config, CHUNK_SCORES, **parallel)
    assert ranks == pytest.approx([expected] * tensor, rel=0.01)


@LAYOUTS
@POLICIES_AT_WORK
def test_with_a_small_ffn_a_layer_takes_no_more_than_is_said(
    tmp_path: Path, tensor: int, sequence: bool, recompute: str, chunk: int
) -> None:
    """And no less than three quarters: query, key and value, computed together, then take most."""
    parallel = {"tensor": tensor, "sequence": sequence}
    expected, ranks = estimated_and_measured(tmp_path, "bf16", parallel, 1, recompute, chunk)
    assert all(0.75 * expected < measured <= expected for measured in ranks)


def estimated_and_measured(
    folder: Path, precision: str, parallel: dict[str, Any], ffn: int, recompute: str, chunk: int
) -> tuple[int, list[int]]:
    """Bytes of a layer at its fullest, by formula, and on each rank."""
    config = layer_config(folder, precision, 512, parallel, recompute, ffn)
    expected = layer_activations(config, recompute) + backward_at_work(config, recompute, chunk)
    return expected, run_ranks(parallel["tensor"], most_of_a_layer, config, chunk, **parallel)


def measure_logits(layout: Layout, config: RunConfig) -> int:
    dtype = DTYPES[config.training.precision]
    embedding = Embedding(config.model, layout.tensor).to(dtype)
    norm = FinalNorm(config.model, layout.tensor).to(dtype)
    torch.nn.init.normal_(embedding.weight)
    b, s = config.training.micro_batch_size, config.data.sequence_length
    x = torch.randn(s, b, config.model.hidden_size, dtype=dtype, requires_grad=True)
    labels = torch.zeros(b, s, dtype=torch.long), torch.ones(b, s)
    embedding.weight.grad = torch.zeros_like(embedding.weight)

    def run() -> list[Tensor]:
        logits = embedding.logits(norm(x))  # held to the end, as the pipeline engine does
        language_model_loss(logits, labels).backward()
        return [logits]

    _, most = allocated(run)
    return most + x.nbytes


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_logits_are_what_the_head_takes(tmp_path: Path, precision: str) -> None:
    """Within 5 %: forward and backward through norm, head and loss at their fullest."""
    config = toy_config(
        tmp_path,
        model={"vocab_size": 1024},
        training={"precision": precision, "micro_batch_size": 64, "global_batch_size": 64},
    )
    (measured,) = run_ranks(1, measure_logits, config)
    assert logits(config) == pytest.approx(measured, rel=0.05)


def test_what_scores_keeps_does_not_depend_on_n(tmp_path: Path) -> None:
    sizes = [
        toy_config(tmp_path, model={"tokens": {"qkv": n, "output": n, "ffn": 4 * n}}) for n in (32, 9216)
    ]
    few, many = (layer_activations(config, "scores") for config in sizes)
    assert few == many < layer_activations(sizes[0], "none")
