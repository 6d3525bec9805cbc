"""The dense layer: against GPT as written down in one page, and split over ranks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megatron_tokenformer.config.schema import Model
from megatron_tokenformer.config.sizes import flops_per_token, parameter_count
from megatron_tokenformer.model.initialization import normal_rows
from megatron_tokenformer.model.language_model import LanguageModel, full_shapes, initialize
from megatron_tokenformer.model.pipeline import language_model_loss
from megatron_tokenformer.parallel.collectives import TensorParallel
from megatron_tokenformer.parallel.layout import Layout
from tests.ranks import run_ranks

MODEL = Model(
    architecture="transformer",
    layers=2,
    hidden_size=32,
    attention_heads=4,
    vocab_size=48,
    rotary_fraction=0.5,
)
D = MODEL.hidden_size


def reference_logits(weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """A GPT, [b, s] ids to [b, s, v]; heads, positions and rotations one at a time."""
    channels = D // MODEL.attention_heads
    rotated = channels // 2

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        spread = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return centred / spread * (1 + weights[f"{name}.gain_minus_one"]) + weights[f"{name}.bias"]

    def rotate(x: Tensor) -> Tensor:  # [b, s, c]: channels i and i + r/2 by position / 10000^(2i/r)
        turned = x.clone()
        for i in range(rotated // 2):
            angle = torch.arange(x.shape[1], dtype=x.dtype) / 10000 ** (2 * i / rotated)
            a, b = x[..., i], x[..., i + rotated // 2]
            turned[..., i] = a * angle.cos() - b * angle.sin()
            turned[..., i + rotated // 2] = b * angle.cos() + a * angle.sin()
        return turned

    def attention(x: Tensor, name: str) -> Tensor:
        q, k, v = (x @ weights[f"{name}.{part}.weight"].T for part in ("query", "key", "value"))
        contexts = []
        for head in range(MODEL.attention_heads):
            own = slice(head * channels, (head + 1) * channels)
            scores = rotate(q[..., own]) @ rotate(k[..., own]).mT / math.sqrt(channels)
            later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            contexts.append(scores.masked_fill(later, -math.inf).softmax(-1) @ v[..., own])
        return torch.cat(contexts, dim=-1) @ weights[f"{name}.output.weight"]

    x = weights["embedding.weight"][tokens]
    for layer in (f"layers.{i}" for i in range(MODEL.layers)):
        x = x + attention(norm(x, f"{layer}.attention_norm"), f"{layer}.attention")
        inner = norm(x, f"{layer}.mlp_norm") @ weights[f"{layer}.mlp.up.weight"].T
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        x = x + inner @ weights[f"{layer}.mlp.down.weight"]
    return norm(x, "final_norm") @ weights["embedding.weight"].T


def build(ranks: TensorParallel = TensorParallel()) -> LanguageModel:
    """With initial values large enough that every part of it matters, the norms' too."""
    module = LanguageModel(MODEL, ranks)
    initialize(module, MODEL, seed=3, ranks=ranks)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.mul_(10.0)
            if parameter.dim() == 1:
                assert not parameter.any()
                parameter.add_(normal_rows(5, name, range(1), D, 0.3)[0])
    return module.double()


def some_tokens() -> Tensor:
    return torch.randint(0, MODEL.vocab_size, (3, 12), generator=torch.Generator().manual_seed(0))


def test_equals_the_plain_reference() -> None:
    module, tokens = build(), some_tokens()
    expected = reference_logits(dict(module.named_parameters()), tokens)
    torch.testing.assert_close(module(tokens).transpose(0, 1), expected, rtol=1e-5, atol=1e-5)


def test_a_document_is_what_it_is_alone() -> None:
    module, tokens = build(), some_tokens()
    places = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]]).expand(3, -1)
    together = module(tokens, places)
    torch.testing.assert_close(together[:5], module(tokens[:, :5]), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(together[5:], module(tokens[:, 5:]), rtol=1e-5, atol=1e-5)


def losses_and_gradients(layout: Layout) -> tuple[float, dict[str, Tensor]]:
    module, tokens = build(layout.tensor), some_tokens()
    labels = tokens.roll(-1, dims=1)
    loss = language_model_loss(module(tokens), (labels, torch.linspace(0, 1, labels.numel()).view_as(labels)))
    loss.backward()
    return loss.item(), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tensor, sequence", [(2, False), (2, True), (4, True)])
def test_split_over_ranks_has_the_same_loss_and_gradients(tensor: int, sequence: bool) -> None:
    ((loss, gradients),) = run_ranks(1, losses_and_gradients)
    parts = run_ranks(tensor, losses_and_gradients, tensor=tensor, sequence=sequence)
    assert set(gradients) == set(full_shapes(MODEL))
    for name, whole in gradients.items():
        for rank, (_, own) in enumerate(parts):
            expected = whole.chunk(tensor)[rank] if whole.dim() == 2 else whole
            torch.testing.assert_close(own[name], expected, rtol=1e-4, atol=1e-5, msg=f"{name} on {rank}")
    assert [part[0] for part in parts] == pytest.approx([loss] * tensor, rel=1e-6)


def test_initial_values_are_those_of_gpt2() -> None:
    model = MODEL.model_copy(update={"hidden_size": 256, "layers": 3})
    module = LanguageModel(model)
    initialize(module, model, 1, TensorParallel())
    for layer in module.layers:
        for part in (layer.attention.query, layer.attention.key, layer.attention.value, layer.mlp.up):
            assert part.weight.std().item() == pytest.approx(0.02, rel=0.02)
        for part in (layer.attention.output, layer.mlp.down):
            assert part.weight.std().item() == pytest.approx(0.02 / math.sqrt(6), rel=0.02)


def test_counts_are_those_of_the_module_and_of_the_products_it_makes() -> None:
    module, tokens = build().float(), some_tokens()
    assert parameter_count(MODEL) == sum(p.numel() for p in module.parameters())
    with FlopCounterMode(display=False) as counter:
        module(tokens).sum().backward()
    counted = counter.get_flop_counts()["Global"]
    products = sum(count for op, count in counted.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    assert flops_per_token(MODEL, 0) * tokens.numel() == products
    attention = 2 * 2 * (10 / 2) * D  # two products, causal: half of the positions on average
    assert flops_per_token(MODEL, 10) - flops_per_token(MODEL, 0) == 3 * MODEL.layers * attention
