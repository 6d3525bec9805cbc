"""Generation: with the cache as without, in a batch as alone, sampled as the softmax says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_tokenformer.data.tokenizers import ByteTokenizer
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.evaluation.generation import (
    Prompt,
    PromptEncoder,
    generate,
    next_logits,
    padded_left,
)
from megatron_tokenformer.evaluation.sampling import Sampling, choose, penalise
from megatron_tokenformer.model.cache import Cache
from megatron_tokenformer.model.language_model import LanguageModel
from tests.evaluation.models import byte_model, plain_logits

CPU = torch.device("cpu")
PROMPTS = [list(b"a"), list(b"the cat sat"), list(b"hello"), list(b"to be or not to be, that is")]
TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module", params=["tokenformer", "dense"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return byte_model(dense=request.param == "dense")


def plain_greedy(model: LanguageModel, ids: list[int], count: int) -> list[int]:
    """The likeliest tokens one after another, all read again for each."""
    written: list[int] = []
    while len(written) < count:
        written.append(int(plain_logits(model, ids + written)[-1, : TOKENIZER.vocab_size].argmax()))
        if written[-1] == TOKENIZER.eod_id:
            return written[:-1]
    return written


def test_every_step_of_a_ragged_batch_has_the_logits_of_each_prompt_alone(model: LanguageModel) -> None:
    following = torch.randint(0, 256, (len(PROMPTS), 12), generator=torch.Generator().manual_seed(1))
    tokens, starts = padded_left(PROMPTS, CPU)
    cache = Cache(starts, tokens.shape[1] + 12, len(model.layers))
    for step in range(12):
        logits = next_logits(model, tokens, cache)
        for row, prompt in enumerate(PROMPTS):
            alone = plain_logits(model, prompt + following[row, :step].tolist())[-1]
            torch.testing.assert_close(logits[row], alone, atol=1e-5, rtol=0)
        tokens = following[:, step : step + 1]


@pytest.mark.parametrize("rotary", [0.0, 1.0])
@pytest.mark.parametrize("pieces", [(7, 9, 1), (1, 16), (16, 1)])
@pytest.mark.parametrize("rows", [[list(range(17))], [list(range(3, 20)), list(range(30, 42))]])
def test_a_prompt_may_be_read_in_pieces(
    rotary: float, pieces: tuple[int, ...], rows: list[list[int]]
) -> None:
    model = byte_model(rotary_fraction=rotary)
    tokens, starts = padded_left(rows, CPU)
    cache = Cache(starts, 17, len(model.layers))
    read = [next_logits(model, piece, cache) for piece in tokens.split(pieces, dim=1)]
    for row, prompt in enumerate(rows):
        torch.testing.assert_close(read[-1][row], plain_logits(model, prompt)[-1], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="18 columns in a cache of 17"):
        cache.read(1)


def test_a_batch_writes_what_a_loop_without_cache_and_batch_would(model: LanguageModel) -> None:
    written = generate(model, TOKENIZER, [Prompt(ids) for ids in PROMPTS], max_tokens=24)
    assert [text.ids for text in written] == [plain_greedy(model, ids, 24) for ids in PROMPTS]
    assert len({tuple(text.ids) for text in written}) > 1, "the prompts have a say"


def test_the_end_of_the_document_ends_a_text_and_the_others_go_on(model: LanguageModel) -> None:
    alone = [plain_greedy(model, ids, 9) for ids in PROMPTS]
    row, place = 1, 4
    ender = byte_model(dense=hasattr(model.layers[0], "mlp"))
    # The row of the end of a document becomes a likelier copy of the token that this prompt writes fifth.
    with torch.no_grad():
        ender.embedding.weight[256] = 1.5 * ender.embedding.weight[alone[row][place]]
    expected = [plain_greedy(ender, ids, 9) for ids in PROMPTS]
    written = generate(ender, TOKENIZER, [Prompt(ids) for ids in PROMPTS], max_tokens=9)
    assert [text.ids for text in written] == expected
    assert {text.finish for text in written} <= {"end of document", "length"}
    assert [text.finish == "length" for text in written] == [len(ids) == 9 for ids in expected]
    assert any(text.finish == "end of document" for text in written)


def test_rows_of_the_head_that_no_token_has_are_never_chosen() -> None:
    model = byte_model()
    with torch.no_grad():
        model.embedding.weight[257:] = 50.0 * model.embedding.weight[:3]
    prompts = [Prompt([row], (row,)) for row in range(40)]
    assert max(int(plain_logits(model, prompt.ids)[-1].argmax()) for prompt in prompts) >= 257
    for sampling in (Sampling(), Sampling(temperature=2.0)):
        written = generate(model, TOKENIZER, prompts, sampling, max_tokens=3)
        assert all(0 <= token < 256 for text in written for token in text.ids)


def test_a_sample_depends_on_its_seed_and_prompt_alone(model: LanguageModel) -> None:
    hot = Sampling(temperature=1.0)
    prompts = [Prompt(ids, (7, number)) for number, ids in enumerate(PROMPTS)]
    together = generate(model, TOKENIZER, prompts, hot, max_tokens=12)
    alone = [generate(model, TOKENIZER, [prompt], hot, max_tokens=12)[0] for prompt in prompts]
    assert [text.ids for text in together] == [text.ids for text in alone]
    again = generate(model, TOKENIZER, [Prompt(prompts[1].ids, (8, 1))], hot, max_tokens=12)
    assert again[0].ids != together[1].ids


def test_what_is_sampled_is_distributed_as_the_softmax() -> None:
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.2, -3.0, 2.0])
    expected = np.exp(logits.double().numpy() / 0.7)
    expected /= expected.sum()
    draws = torch.from_numpy(np.random.default_rng(11).random(50_000))
    chosen = choose(logits.expand(len(draws), -1), Sampling(temperature=0.7), draws)
    counts = np.bincount(chosen.numpy(), minlength=7)
    statistic = float(((counts - len(draws) * expected) ** 2 / (len(draws) * expected)).sum())
    # Chi-squared with 6 degrees of freedom is above 52 once in 500 million; these draws are always the same.
    assert statistic < 52.0
    # And the test would tell: the distribution of another temperature is far outside.
    other = np.exp(logits.double().numpy() / 0.75)
    other /= other.sum()
    assert float(((counts - len(draws) * other) ** 2 / (len(draws) * other)).sum()) > 52.0


def kept(probabilities: list[float], top_k: int, top_p: float) -> dict[int, float]:
    """Which tokens remain, and with which probability."""
    order = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])
    order = order[:top_k] if top_k else order
    of_those, chosen, before = math.fsum(probabilities[token] for token in order), [], 0.0
    for token in order:
        if before >= top_p:
            break
        chosen.append(token)
        before += probabilities[token] / of_those
    whole = math.fsum(probabilities[token] for token in chosen)
    return {token: probabilities[token] / whole for token in chosen}


@pytest.mark.parametrize("top_k, top_p", [(1, 1.0), (3, 1.0), (0, 0.5), (0, 0.01), (4, 0.8), (99, 0.95)])
def test_top_k_and_top_p_keep_the_likeliest_in_proportion(top_k: int, top_p: float) -> None:
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.2, -3.0])
    expected = kept(logits.double().softmax(0).tolist(), top_k, top_p)
    draws = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000  # every part of [0, 1) alike
    chosen = choose(logits.expand(len(draws), -1), Sampling(1.0, top_k, top_p), draws)
    found = {int(token): (chosen == token).double().mean().item() for token in chosen.unique()}
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("draw", [0.0, 1.0 - 2.0**-53])
def test_the_ends_of_the_draws_choose_tokens_that_can_be(draw: float) -> None:
    logits = torch.full((4, 50), -torch.inf)
    logits[:, 7] = torch.tensor([0.0, 1.0, -5.0, 30.0])
    logits[:, 9] = 0.1
    chosen = choose(logits, Sampling(temperature=1.0), torch.full((4,), draw, dtype=torch.float64))
    assert set(chosen.tolist()) <= {7, 9}


def test_the_penalty_makes_seen_tokens_less_likely_whatever_the_sign() -> None:
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert penalise(logits, seen, 2.0).tolist() == [[1.0, -4.0, 2.0, -2.0]]


def test_the_penalty_counts_the_prompt_and_what_was_written(model: LanguageModel) -> None:
    (written,) = generate(
        model, TOKENIZER, [Prompt(PROMPTS[1])], Sampling(repetition_penalty=1.5), max_tokens=20
    )
    ids = list(PROMPTS[1])
    for token in written.ids:
        logits = plain_logits(model, ids)[-1, : TOKENIZER.vocab_size]
        for one in set(ids):
            logits[one] = logits[one] / 1.5 if logits[one] > 0 else logits[one] * 1.5
        assert token == int(logits.argmax())
        ids.append(token)


def test_a_stop_text_ends_a_text_and_is_not_part_of_it(model: LanguageModel) -> None:
    (whole,) = generate(model, TOKENIZER, [Prompt(PROMPTS[3])], Sampling(1.0), max_tokens=60)
    stop = whole.text[20:23]
    shown: list[str] = []
    (cut,) = generate(
        model,
        TOKENIZER,
        [Prompt(PROMPTS[3])],
        Sampling(1.0),
        max_tokens=60,
        stops=["never there", stop],
        show=lambda row, text: shown.append(text),
    )
    assert cut.finish == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)] == "".join(shown)


@pytest.mark.parametrize(
    "wrong, told",
    [
        ({"temperature": -1.0}, "--temperature -1 must be a number from 0 up"),
        ({"temperature": math.nan}, "--temperature nan"),
        ({"top_k": -2}, "--top-k -2 must be at least 0"),
        ({"top_p": 0.0}, "--top-p 0 must be above 0, at most 1"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty 0 must be above 0"),
    ],
)
def test_values_that_mean_nothing_are_refused(wrong: dict[str, float], told: str) -> None:
    with pytest.raises(UserError, match=told):
        Sampling(**wrong)  # type: ignore[arg-type]


class Templated:
    """A tokenizer whose template puts ids around every text."""

    def __init__(self, before: list[int], after: list[int]) -> None:
        self.before, self.after, self.eod_id = before, after, 256

    def encode(self, text: str) -> list[int]:
        return [*self.before, *text.encode(), *self.after]


@pytest.mark.parametrize("before", [[], [3], [256]])
@pytest.mark.parametrize("after", [[], [256]])
def test_a_prompt_has_no_end_of_document_after_it(before: list[int], after: list[int]) -> None:
    encode = PromptEncoder(Templated(before, after))  # type: ignore[arg-type]
    assert encode("ab") == [*before, 97, 98]
    assert encode.before == before
    assert encode("") == (before or [256]), "an empty prompt is the beginning of a document"
