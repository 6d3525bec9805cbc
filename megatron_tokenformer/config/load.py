"""Read a run's configuration: one YAML file, then `section.key=value` overrides, checked as a whole.

A config may name others with `base: FILE` or `base: [FILE, FILE]` (relative to itself): they are read first,
each merged onto those before it, key by key.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.errors import UserError

Schema = TypeVar("Schema", bound=BaseModel)
Tree = dict[str, Any]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `6e-4` as text; people who train models mean a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """The run described by a YAML file and `section.key=value` overrides.

    Raises:
        UserError: a file that is not there or not YAML, an unknown key (with the nearest valid
            name), a value of the wrong kind, or keys that contradict each other.
    """
    tree = read_yaml(path)
    for text in overrides or []:
        merge(tree, parse_override(text))
    return validate(RunConfig, tree, str(path))


def read_yaml(path: str | Path, readers: tuple[Path, ...] = ()) -> Tree:
    """The mapping in a YAML file, merged onto its `base` files if it names any.

    Args:
        readers: the files whose `base` this one is, one of the next.
    """
    path = Path(path)
    if path.resolve() in readers:
        raise UserError(f"{path} is its own base: {' -> '.join(str(reader) for reader in readers)}")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:  # a date that is none, a number of thousands of digits
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds {type(tree).__name__}, not a mapping of sections")
    base = tree.pop("base", None)
    bases = base if isinstance(base, list) else [] if base is None else [base]
    merged: Tree = {}
    for base in bases:
        if not isinstance(base, str):
            raise UserError(f"{path}: base={base!r} is not the name of a file")
        merge(merged, read_yaml(path.parent / base, (*readers, path.resolve())))
    return merge(merged, tree)


def parse_override(text: str) -> Tree:
    """`training.steps=100` as `{"training": {"steps": 100}}`; the value is YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"'{text}' is not an override; write section.key=value")
    try:
        tree: Any = yaml.load(value, _Loader)
    except (yaml.YAMLError, ValueError):
        raise UserError(f"the value of the override '{text}' is not valid YAML") from None
    for part in reversed(key.split(".")):
        tree = {part: tree}
    return tree


def merge(tree: Tree, update: Tree) -> Tree:
    """Merge `update` into `tree` in place, mapping by mapping, and return it."""
    for key, value in update.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            merge(tree[key], value)
        else:
            tree[key] = value
    return tree


def validate(schema: type[Schema], tree: Tree, source: str) -> Schema:
    """Check a mapping against a schema; `source` names it in errors.

    Raises:
        UserError: one line per mistake, the first word of each being the key.
    """
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        mistakes = [_in_words(schema, detail) for detail in error.errors()]
        raise UserError(f"{source}: " + "; ".join(mistakes)) from None


def dump_config(config: BaseModel) -> str:
    """The config as YAML that `load_config` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _in_words(schema: type[BaseModel], detail: ErrorDetails) -> str:
    location = [str(part) for part in detail["loc"]]
    key = ".".join(location)
    if detail["type"] == "extra_forbidden":
        return f"unknown key '{key}'{_nearest(schema, location)}"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return message
    return f"{key}={detail['input']!r}: {message[0].lower()}{message[1:]}"


def _nearest(schema: type[BaseModel], location: list[str]) -> str:
    """`; did you mean '...'?` for an unknown key, looking first beside it, then in other sections."""
    beside = _section(schema, location[:-1])
    here = {".".join([*location[:-1], name]): name for name in beside.model_fields}
    everywhere = {path: path.rsplit(".", 1)[-1] for path in _paths(schema)}
    for names, cutoff in ((here, 0.6), (everywhere, 0.8)):
        close = difflib.get_close_matches(location[-1], list(names.values()), n=1, cutoff=cutoff)
        if close:
            path = next(path for path, name in names.items() if name == close[0])
            return f"; did you mean '{path}'?"
    return f"; valid here: {', '.join(beside.model_fields)}"


def _section(schema: type[BaseModel], location: list[str]) -> type[BaseModel]:
    for part in location:
        schema = (part in schema.model_fields and submodel(schema.model_fields[part])) or schema
    return schema


def submodel(field: FieldInfo) -> type[BaseModel] | None:
    """The schema that a field holds, itself or as a member of a union or list."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _paths(schema: type[BaseModel], prefix: str = "") -> list[str]:
    paths: list[str] = []
    for name, field in schema.model_fields.items():
        section = submodel(field)
        paths += _paths(section, f"{prefix}{name}.") if section else [f"{prefix}{name}"]
    return paths
