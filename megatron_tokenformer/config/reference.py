"""Tables of all keys of a schema as Markdown: kind, bounds, default and meaning, read off the schema."""

from __future__ import annotations

import ast
import inspect
import json
import types
from collections.abc import Iterator
from dataclasses import dataclass
from textwrap import dedent
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_tokenformer.config.load import submodel

WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false", Any: "anything"}
OR_NULL = ", or null"
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


@dataclass(frozen=True)
class Key:
    """One key of a schema, in words."""

    name: str
    kind: str
    """with its bounds"""
    default: str
    meaning: str


def tables(schema: type[BaseModel], path: str = "", level: int = 2) -> Iterator[str]:
    """The lines of Markdown for a schema: its own keys, then a heading with a table for each of its sections.

    Args:
        path: what comes before the keys, `section.`.
        level: of the headings.
    """
    keys = own_keys(schema, path)
    if keys:
        yield from ("| key | kind | default | meaning |", "|---|---|---|---|")
        yield from (f"| `{key.name}` | {key.kind} | {key.default} | {key.meaning} |" for key in keys)
        yield ""
    for name, section, inner in sections(schema, path):
        yield from (f"{'#' * level} `{name}`", "", in_one_line(section.__doc__ or ""), "")
        if meaning := meanings(schema).get(name.removeprefix(path).removesuffix(".NAME")):
            yield from (f"{meaning[0].upper()}{meaning[1:]}.", "")
        yield from tables(section, inner, level + 1)


def own_keys(schema: type[BaseModel], path: str = "") -> list[Key]:
    """The keys of a schema that are no sections of their own.

    Raises:
        KeyError: a field without a docstring, or of a kind that there are no words for.
    """
    meant = meanings(schema)
    return [
        Key(f"{path}{name}", kind(_annotated(field)), default(field), meant[name])
        for name, field in schema.model_fields.items()
        if submodel(field) is None
    ]


def sections(schema: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel], str]]:
    """The sections of a schema: the name of each, its own schema, and what comes before its keys."""
    for name, field in schema.model_fields.items():
        inner = submodel(field)
        if inner is not None:
            listed = ".NAME" if get_origin(field.annotation) is list else ""
            yield f"{path}{name}{listed}", inner, f"{path}{name}{listed}."


def meanings(schema: type[BaseModel]) -> dict[str, str]:
    """The docstrings under the fields of a schema, each in one line."""
    body = ast.parse(dedent(inspect.getsource(schema))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, following in zip(body.body, body.body[1:]):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            found[field.target.id] = in_one_line(str(following.value.value))
    return found


def kind(annotation: Any) -> str:
    """A type in words, with its bounds: `whole number, at least 1, at most 2^40`; those of a tuple are alike.

    Raises:
        KeyError: there are no words for it.
    """
    origin, members = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        words, null, _ = kind(members[0]).partition(OR_NULL)
        return ", ".join([words, *_bounds(members[1:])]) + null
    if origin is Literal:
        return "one of " + ", ".join(f"`{member}`" for member in members)
    if origin in (Union, types.UnionType):
        there = " or ".join(kind(member) for member in members if member is not type(None))
        return there + (OR_NULL if type(None) in members else "")
    if origin is list:
        return f"list of {kind(members[0])}"
    if origin is tuple:
        each = [kind(member).partition(", ") for member in members]
        bounds = f", each {each[0][2]}" if each[0][2] else ""
        return f"[{', '.join(word for word, _, _ in each)}]{bounds}"
    if origin is dict:
        return "mapping"
    return WORDS[annotation]


def default(field: FieldInfo) -> str:
    """The default of a field as YAML has it."""
    if field.is_required():
        return "must be given"
    value = field.default
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def in_one_line(text: str) -> str:
    """A docstring without its line breaks and with what would end a cell of a table escaped."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _annotated(field: FieldInfo) -> Any:
    """The annotation with the bounds that pydantic has taken out of it."""
    told = (field.annotation, *field.metadata)
    return Annotated[told] if field.metadata else field.annotation


def _bounds(metadata: tuple[Any, ...]) -> Iterator[str]:
    for one in metadata:
        if isinstance(one, FieldInfo):
            yield from _bounds(tuple(one.metadata))
        for name, words in BOUNDS.items():
            if hasattr(one, name):
                yield f"{words} {_number(getattr(one, name))}"


def _number(value: float) -> str:
    """A bound as people write it: 2^31 - 1 rather than ten digits."""
    for base, exponents in ((2, range(14, 64)), (10, range(5, 19))):
        for exponent in exponents:
            for less, words in ((0, ""), (1, " - 1")):
                if value == base**exponent - less:
                    return f"{base}^{exponent}{words}"
    return f"{value:g}" if isinstance(value, float) else f"{value:,}"
