"""The configuration reference: complete, right about defaults and bounds, and the page is up to date."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from megatron_tokenformer.commands.config_reference import main, page
from megatron_tokenformer.config.reference import Key, kind, meanings, own_keys, sections
from megatron_tokenformer.config.schema import RunConfig, Section, StepsOrZero
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.progressive.schema import Schedule

PAGE = Path(__file__).parents[2] / "docs/configuration.md"


def every(schema: type[BaseModel], path: str = "") -> Iterator[tuple[type[BaseModel], Key]]:
    """All keys under a schema, each with the section it is of."""
    yield from ((schema, key) for key in own_keys(schema, path))
    for _, section, inner in sections(schema, path):
        yield from every(section, inner)


KEYS = [*every(RunConfig), *every(Schedule)]


def test_the_page_is_what_the_schema_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), (
        "python tools/config_reference.py > docs/configuration.md"
    )


def test_every_key_of_a_run_has_a_row() -> None:
    def leaves(tree: dict[str, Any], path: str = "") -> Iterator[str]:
        for name, value in tree.items():
            yield from leaves(value, f"{path}{name}.") if isinstance(value, dict) else [f"{path}{name}"]

    named = {key.name for _, key in every(RunConfig)}
    # A config has no tokenizer by default, so its keys are not in the dump.
    assert {name for name in named if not name.startswith("data.tokenizer")} == set(
        leaves(RunConfig().model_dump())
    ) - {"data.tokenizer"}


@pytest.mark.parametrize("section, key", KEYS, ids=[key.name for _, key in KEYS])
def test_a_row_says_something_and_the_default_is_the_default(section: type[BaseModel], key: Key) -> None:
    name = key.name.rsplit(".", 1)[-1]
    assert len(key.meaning) >= 5 and key.kind
    if key.default == "must be given":
        assert section.model_fields[name].is_required()
        return
    told = re.sub(r"(?<=\d)e-", ".0e-", key.default.strip("`"))  # YAML takes 1e-05 for a word
    stated = section.model_fields[name].default
    assert yaml.safe_load(told) == (list(stated) if isinstance(stated, tuple) else stated)


@pytest.mark.parametrize("section, key", KEYS, ids=[key.name for _, key in KEYS])
def test_bounds_are_those_that_are_checked(section: type[BaseModel], key: Key) -> None:
    """What is beyond a bound is refused for being beyond it, what is on it is not."""
    name = key.name.rsplit(".", 1)[-1]
    bounds = re.findall(r"(at least|at most|above|below) ([\d.,^ -]+?)(?:, |$)", key.kind)
    for word, text in bounds:
        bound = float(eval(text.replace(",", "").replace("^", "**")))
        whole = key.kind.startswith("whole")
        beyond = bound + {"at least": -1, "at most": 1, "above": 0, "below": 0}[word]
        value: Any = int(beyond) if whole else beyond
        if key.kind.startswith("["):
            value = [value] * 2
        with pytest.raises(ValidationError) as refused:
            section.model_validate({name: value})
        found = [error["type"] for error in refused.value.errors() if error["loc"][0] == name]
        kinds = {"at least": "greater_than_equal", "at most": "less_than_equal", "above": "greater_than"}
        assert kinds.get(word, "less_than") in found


def test_kinds_in_words() -> None:
    assert kind(int) == "whole number"
    assert kind(str | None) == "text, or null"
    assert kind(StepsOrZero | None) == "whole number, at least 0, at most 10^12, or null"
    assert (
        kind(Annotated[int | None, Field(ge=0, lt=2**31)]) == "whole number, at least 0, below 2^31, or null"
    )
    assert kind(list[tuple[float, str]]) == "list of [number, text]"
    share = Annotated[float, Field(ge=0, lt=1)]
    assert kind(tuple[share, share]) == "[number, number], each at least 0, below 1"
    assert TypeAdapter(tuple[share, share]).validate_python([0.5, 0.5])
    with pytest.raises(KeyError):
        kind(bytes)


def test_a_key_without_a_docstring_is_not_passed_over() -> None:
    class Silent(Section):
        told: int = 1
        """something | more"""
        untold: int = 2

    assert meanings(Silent) == {"told": "something \\| more"}
    with pytest.raises(KeyError, match="untold"):
        own_keys(Silent)


def test_one_key_and_one_section(capsys: pytest.CaptureFixture[str]) -> None:
    main(["training.seed"])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("training.seed: whole number, at least 0, below 2^63; default 1234; ")
    main(["logging"])
    assert "logging.wandb.mode: one of online, offline, disabled" in capsys.readouterr().out
    with pytest.raises(UserError, match="no key and no section 'loging'"):
        main(["loging"])
