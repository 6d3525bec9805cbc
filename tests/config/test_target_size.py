"""Target sizes: what is asked for is met to the nearest multiple of 32 tokens, and nonsense is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_tokenformer.config.load import load_config
from megatron_tokenformer.config.schema import Model, Tokens
from megatron_tokenformer.config.sizes import parameter_count
from megatron_tokenformer.config.target_size import parse_count, parse_tokens, tokens_for
from megatron_tokenformer.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("size", ["354m", "757m"])
def test_a_number_of_parameters_gives_the_model_of_the_ladder(size: str) -> None:
    first = load_config(CONFIGS / "tokenformer-124m.yaml").model
    assert (
        tokens_for(first, parse_count(size)) == load_config(CONFIGS / f"tokenformer-{size}.yaml").model.tokens
    )


@pytest.mark.parametrize("tokens", [(576, 576, 2304), (2140, 2140, 8560), (100, 64, 300), (7, 5, 3)])
@pytest.mark.parametrize("millions", [200, 354, 900, 1400, 3000])
def test_no_other_multiple_of_32_is_nearer(tokens: tuple[int, int, int], millions: int) -> None:
    before = Model(tokens=Tokens(qkv=tokens[0], output=tokens[1], ffn=tokens[2]))
    if parameter_count(before) >= millions * 10**6:
        with pytest.raises(UserError, match="is no growth"):
            tokens_for(before, millions * 10**6)
        return
    chosen = tokens_for(before, millions * 10**6).model_dump()
    old = before.tokens.model_dump()
    smallest = min(old, key=lambda role: old[role])
    for role, count in chosen.items():
        exact = chosen[smallest] * old[role] / old[smallest]
        assert count >= old[role] and (count == old[role] or count % 32 == 0)
        assert count == old[role] or abs(count - exact) <= 16, "the proportions stay"

    def off(fewest: int) -> float:
        scaled = Tokens(**{role: max(1, round(fewest * old[role] / old[smallest])) for role in old})
        return abs(parameter_count(before.model_copy(update={"tokens": scaled})) - millions * 10**6)

    multiples = range(32, 40_000, 32)
    assert off(chosen[smallest]) == min(map(off, multiples))


@pytest.mark.parametrize(
    "text, count",
    [("757M", 757_000_000), ("1.4B", 1_400_000_000), ("1.4b", 1_400_000_000), ("350K", 350_000)],
)
def test_counts_are_read_as_people_write_them(text: str, count: int) -> None:
    assert parse_count(text) == count
    assert parse_count(str(count)) == count


@pytest.mark.parametrize("text", ["", "M", "-1B", "1e9", "1.4 G", "nan", "757MB"])
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"write one such as 757M or 1\.4B"):
        parse_count(text)


@pytest.mark.parametrize("shrink", [False, True])
def test_more_than_any_model_has_is_refused_by_its_count(shrink: bool) -> None:
    most = f"input should be less than or equal to {2**40}"
    with pytest.raises(UserError, match=f"--tokens qkv=9{{20}}: qkv=9{{20}}: {most}"):
        parse_tokens(f"qkv={'9' * 20}", Tokens())
    with pytest.raises(UserError, match="is not a count for a role"):
        parse_tokens(f"qkv={'9' * 5000}", Tokens())
    with pytest.raises(UserError, match="is no shrinking" if shrink else f"--target-params .*{most}"):
        tokens_for(Model(), parse_count("999999999999999B"), shrink)
    with pytest.raises(UserError, match="is not a number of parameters"):
        parse_count("9" * 5000)


@pytest.mark.parametrize("parameters", [0, 1_000, 123_000_000, 124_000_000])
def test_a_target_that_is_not_larger_is_refused_with_both_numbers(parameters: int) -> None:
    with pytest.raises(UserError, match=f"{parameters:,} is no growth.*has 123,5"):
        tokens_for(Model(), parameters)


@pytest.mark.parametrize("size", ["124m", "354m"])
def test_shrinking_goes_down_the_ladder(size: str) -> None:
    last = load_config(CONFIGS / "tokenformer-757m.yaml").model
    chosen = tokens_for(last, parse_count(size), shrink=True)
    assert chosen == load_config(CONFIGS / f"tokenformer-{size}.yaml").model.tokens


@pytest.mark.parametrize(
    "before, after",
    [
        ((64, 64, 256), (32, 32, 128)),
        ((100, 64, 3000), (64, 32, 1504)),
        ((100, 16, 3000), (32, 16, 32)),
        ((40, 33, 47), (32, 32, 32)),
    ],
)
def test_shrinking_leaves_32_tokens_of_a_role_that_has_them(
    before: tuple[int, int, int], after: tuple[int, int, int]
) -> None:
    model = Model(tokens=Tokens(qkv=before[0], output=before[1], ffn=before[2]))
    chosen = tokens_for(model, 1, shrink=True)
    assert (chosen.qkv, chosen.output, chosen.ffn) == after


@pytest.mark.parametrize("parameters", [123_600_000, 200_000_000, 123_500_000])
def test_a_target_that_is_not_smaller_is_refused_with_both_numbers(parameters: int) -> None:
    with pytest.raises(UserError, match=f"{parameters:,} is no shrinking.*has 123,5"):
        tokens_for(Model(), parameters, shrink=True)


def test_tokens_by_role_and_a_role_left_out_stays() -> None:
    before = Tokens(qkv=16, output=16, ffn=64)
    assert parse_tokens("qkv=32,output=48,ffn=96", before) == Tokens(qkv=32, output=48, ffn=96)
    assert parse_tokens("ffn=128", before) == Tokens(qkv=16, output=16, ffn=128)


@pytest.mark.parametrize(
    "text", ["", "qkv", "qkv=", "qkv=0", "qkv=-3", "qkv=1.5", "mlp=3", "qkv=32,qkv=64", "qkv=32;"]
)
def test_tokens_that_are_not_roles_and_counts_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="each ROLE one of qkv, output, ffn"):
        parse_tokens(text, Tokens())
