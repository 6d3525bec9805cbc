"""The whole model: against a plain reference, and split over ranks with and without sequence parallelism."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tokenformer.config.schema import Model, Tokens
from megatron_tokenformer.config.sizes import parameter_count
from megatron_tokenformer.model.initialization import normal_rows
from megatron_tokenformer.model.language_model import LanguageModel, full_shapes, initialize
from megatron_tokenformer.model.pipeline import language_model_loss
from megatron_tokenformer.parallel.collectives import TensorParallel
from megatron_tokenformer.parallel.layout import Layout
from tests.ranks import run_ranks

MODEL = Model(
    layers=2,
    hidden_size=32,
    attention_heads=4,
    tokens=Tokens(qkv=16, output=24, ffn=64),
    vocab_size=48,
    rotary_fraction=0.5,
)
DENSE = Model(architecture="transformer", layers=2, hidden_size=32, attention_heads=4, vocab_size=48)


def reference_logits(weights: dict[str, Tensor], tokens: Tensor, model: Model) -> Tensor:
    """The model in one page: [b, s] ids to [b, s, v]."""

    def pattention(x: Tensor, name: str) -> Tensor:
        keys, values = weights[f"{name}.key_tokens"], weights[f"{name}.value_tokens"]
        a = x @ keys.T
        return F.gelu(math.sqrt(len(keys)) * a / a.norm(dim=-1, keepdim=True)) @ values

    def rotate(x: Tensor) -> Tensor:  # [b, h, s, c], pairs (i, i + r/2), angle position / 10000^(2i/r)
        r = int(x.shape[-1] * model.rotary_fraction)
        i, position = torch.arange(r // 2), torch.arange(x.shape[-2])[:, None]
        angle = position / 10000 ** (2 * i / r)
        a, b, rest = x[..., : r // 2], x[..., r // 2 : r], x[..., r:]
        turned = (a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin())
        return torch.cat((*turned, rest), dim=-1)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (model.attention_heads, -1)).transpose(1, 2)

    x = weights["embedding.weight"][tokens]
    for i in range(model.layers):
        h = F.layer_norm(x, x.shape[-1:])
        q, k, v = (heads(pattention(h, f"layers.{i}.attention.{name}")) for name in ("query", "key", "value"))
        scores = rotate(q) @ rotate(k).mT / math.sqrt(q.shape[-1])
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        context = scores.masked_fill(mask, -math.inf).softmax(-1) @ v
        x = x + pattention(context.transpose(1, 2).flatten(2), f"layers.{i}.attention.output")
        x = x + pattention(F.layer_norm(x, x.shape[-1:]), f"layers.{i}.ffn")
    gain, bias = 1 + weights["final_norm.gain_minus_one"], weights["final_norm.bias"]
    return (F.layer_norm(x, x.shape[-1:]) * gain + bias) @ weights["embedding.weight"].T


def build(ranks: TensorParallel = TensorParallel()) -> LanguageModel:
    """The toy model with initial values large enough that every part of it matters."""
    module = LanguageModel(MODEL, ranks)
    initialize(module, MODEL, seed=3, ranks=ranks)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.mul_(10.0 if parameter.dim() == 2 else 0.0)
            if name.startswith("final_norm"):
                parameter.add_(normal_rows(5, name, range(1), MODEL.hidden_size, 0.3)[0])
    return module.double()  # what is left of rounding is the loss's, which is fp32 always


def some_tokens() -> Tensor:
    return torch.randint(0, MODEL.vocab_size, (3, 12), generator=torch.Generator().manual_seed(0))


def test_equals_the_plain_reference() -> None:
    module, tokens = build(), some_tokens()
    expected = reference_logits(dict(module.named_parameters()), tokens, MODEL)
    logits = module(tokens).transpose(0, 1)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)  # rotary is fp32


def test_later_tokens_do_not_change_earlier_logits() -> None:
    module, tokens = build(), some_tokens()
    edited = tokens.clone()
    edited[:, 7] = (edited[:, 7] + 1) % MODEL.vocab_size
    torch.testing.assert_close(module(tokens)[:7], module(edited)[:7], rtol=0, atol=0)
    assert not torch.equal(module(tokens)[7], module(edited)[7])


def losses_and_gradients(layout: Layout) -> tuple[float, dict[str, Tensor]]:
    module, tokens = build(layout.tensor), some_tokens()
    labels = tokens.roll(-1, dims=1)
    weights = torch.linspace(0, 1, labels.numel()).view_as(labels)
    loss = language_model_loss(module(tokens), (labels, weights))
    loss.backward()
    return loss.item(), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def test_the_loss_is_the_weighted_sum_of_cross_entropies() -> None:
    tokens = some_tokens()
    labels = tokens.roll(-1, dims=1)
    weights = torch.linspace(0, 1, labels.numel()).view_as(labels)
    losses = F.cross_entropy(build()(tokens).permute(1, 2, 0), labels, reduction="none")
    ((loss, _),) = run_ranks(1, losses_and_gradients)
    assert loss == pytest.approx((losses * weights).sum().item(), rel=1e-5)


@pytest.mark.parametrize("tensor, sequence", [(2, False), (2, True), (4, False), (4, True)])
def test_split_over_ranks_has_the_same_loss_and_gradients(tensor: int, sequence: bool) -> None:
    ((loss, gradients),) = run_ranks(1, losses_and_gradients)
    parts = run_ranks(tensor, losses_and_gradients, tensor=tensor, sequence=sequence)
    assert {name for name in gradients} == set(full_shapes(MODEL))
    for name, whole in gradients.items():
        split = whole.dim() == 2
        here = torch.cat([part[1][name] for part in parts]) if split else parts[-1][1][name]
        torch.testing.assert_close(here, whole, rtol=1e-4, atol=1e-5, msg=name)
    assert [part[0] for part in parts] == pytest.approx([loss] * tensor, rel=1e-6)


@pytest.mark.parametrize("model", [MODEL, DENSE], ids=["tokenformer", "transformer"])
def test_initial_values_do_not_depend_on_the_split(model: Model) -> None:
    whole = LanguageModel(model)
    initialize(whole, model, 1, TensorParallel())
    parts = [LanguageModel(model, TensorParallel(None, rank, 4)) for rank in range(4)]
    for rank, part in enumerate(parts):
        initialize(part, model, 1, TensorParallel(None, rank, 4))
    for name, parameter in whole.named_parameters():
        pieces = [part.get_parameter(name) for part in parts]
        joined = torch.cat(pieces) if parameter.dim() == 2 else pieces[0]
        assert torch.equal(joined, parameter), name


def test_initial_values_have_the_published_spread() -> None:
    model = MODEL.model_copy(update={"tokens": Tokens(qkv=2048, output=2048, ffn=2048)})
    module = LanguageModel(model)
    initialize(module, model, 1, TensorParallel())
    ffn = module.layers[0].ffn
    assert ffn.key_tokens.std().item() == pytest.approx(0.02, rel=0.02)
    assert ffn.value_tokens.std().item() == pytest.approx(2 / (2 * math.sqrt(32)), rel=0.02)
    assert parameter_count(model) == sum(p.numel() for p in module.parameters())


def test_rows_of_a_taller_model_are_those_of_the_shorter_one() -> None:
    short = normal_rows(1, "layers.0.ffn.key_tokens", range(0, 100), 8, 1.0)
    tall = normal_rows(1, "layers.0.ffn.key_tokens", range(0, 300), 8, 1.0)
    assert torch.equal(short, tall[:100])
    assert torch.equal(normal_rows(1, "layers.0.ffn.key_tokens", range(90, 210), 8, 1.0), tall[90:210])
    assert not torch.equal(short, normal_rows(1, "layers.1.ffn.key_tokens", range(0, 100), 8, 1.0))
