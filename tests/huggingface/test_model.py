"""The exported folder, loaded by transformers, is the native model: its logits, its gradients, its texts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel

from megatron_tokenformer.huggingface.modeling_tokenformer import normalised_scores
from megatron_tokenformer.huggingface.names import exported, exported_name
from megatron_tokenformer.kernels import reference
from tests.huggingface.models import SCORE_NORMS, Pair, assert_same, random_ids


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_are_the_native_models(pair: Pair, attention: str) -> None:
    model = pair.load(attn_implementation=attention)
    assert model.config._attn_implementation == attention
    assert not model.training and model.dtype == torch.float32
    for length in (1, 7, 48):
        ids = random_ids(3, length)
        expected = pair.logits(ids)
        assert expected.abs().max() > 1
        assert_same(model(ids).logits, expected)


def test_gradients_are_the_native_models(pair: Pair) -> None:
    ids = random_ids(3, 20)
    model, native = pair.load().train(), pair.native.requires_grad_(True)
    loss = model(ids, labels=ids).loss
    expected = F.cross_entropy(pair.logits(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)
    loss.backward()
    native.zero_grad()
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for name, parameter in native.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        theirs = gradients.pop(exported_name(name))
        torch.testing.assert_close(theirs, exported(name, parameter.grad), rtol=1e-4, atol=1e-6)
    assert not gradients


@pytest.mark.parametrize("kind", SCORE_NORMS)
def test_a_row_without_scores_has_no_weights_and_no_gradients(kind: str) -> None:
    scores = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    scores[1] = 0.0
    mine, theirs = (scores.clone().requires_grad_(True) for _ in range(2))
    found = normalised_scores(mine, 2.5, kind)
    expected = reference.normalised_scores(theirs, 2.5, kind)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad)


@torch.no_grad()
def continue_greedily(pair: Pair, ids: Tensor, tokens: int) -> Tensor:
    for _ in range(tokens):
        ids = torch.cat((ids, pair.logits(ids)[:, -1:].argmax(dim=-1)), dim=1)
    return ids


def test_generation_with_a_cache_without_one_and_natively(pair: Pair) -> None:
    model, ids = pair.load(), random_ids(3, 9)
    expected = continue_greedily(pair, ids, 25)
    for cache in ({"use_cache": True}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(ids, max_new_tokens=25, do_sample=False, **cache), expected), cache
    ways = ({"do_sample": True, "top_p": 0.9}, {"do_sample": False, "num_beams": 3})
    for way in ways:
        texts = []
        for use_cache in (True, False):
            torch.manual_seed(1)
            texts.append(model.generate(ids, max_new_tokens=12, use_cache=use_cache, **way))
        assert torch.equal(*texts), way
        assert texts[0].shape == (3, 21)


def test_a_cache_takes_several_tokens_at_a_time(pair: Pair) -> None:
    model, ids = pair.load(), random_ids(2, 20)
    first = model(ids[:, :8], use_cache=True)
    cache = first.cache if "cache" in first else first.past_key_values
    second = model(ids[:, 8:], past_key_values=cache)
    logits = torch.cat((first.logits, second.logits), dim=1)
    assert_same(logits, pair.logits(ids))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_padded_on_the_left_are_as_if_alone(pair: Pair, attention: str) -> None:
    model = pair.load(attn_implementation=attention)
    rows = [random_ids(1, length, seed=length) for length in (3, 11, 8)]
    padded = torch.cat([F.pad(row, (11 - row.shape[1], 0)) for row in rows])
    mask = torch.cat([F.pad(torch.ones_like(row), (11 - row.shape[1], 0)) for row in rows])
    logits = model(padded, attention_mask=mask).logits
    assert logits.isfinite().all()
    texts = model.generate(padded, attention_mask=mask, max_new_tokens=10, do_sample=False)
    for row, got, text in zip(rows, logits, texts):
        assert_same(got[None, -row.shape[1] :], pair.logits(row))
        assert torch.equal(text[None, -row.shape[1] - 10 :], continue_greedily(pair, row, 10))


def test_documents_in_a_row_do_not_see_each_other(pair: Pair) -> None:
    ids = random_ids(2, 18)
    positions = torch.tensor([[*range(5), *range(13)], [*range(10), *range(8)]])
    logits = pair.load()(ids, position_ids=positions, use_cache=False).logits
    assert_same(logits, pair.logits(ids, positions))


def test_what_else_a_model_of_transformers_answers(pair: Pair) -> None:
    model, ids = pair.load(attn_implementation="eager"), random_ids(2, 6)
    full = model(ids, output_hidden_states=True, output_attentions=True, use_cache=False)
    assert [tuple(state.shape) for state in full.hidden_states] == [(2, 6, 32)] * 3
    assert [tuple(weights.shape) for weights in full.attentions] == [(2, 4, 6, 6)] * 2
    torch.testing.assert_close(full.attentions[0].sum(dim=-1), torch.ones(2, 4, 6))
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    assert torch.equal(embedded, full.logits)
    assert torch.equal(model(ids, return_dict=False)[0], full.logits)
    assert torch.equal(model(ids, logits_to_keep=2).logits, full.logits[:, -2:])
    base = AutoModel.from_pretrained(pair.folder, trust_remote_code=True)
    native = pair.native.hidden(ids).transpose(0, 1)
    assert_same(base(ids).last_hidden_state, native)
    assert_same(full.hidden_states[-1], native)
