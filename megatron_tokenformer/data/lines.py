"""Lines of JSON to texts: the quick way for a chunk of good ones, and the careful way that names bad ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import orjson

from megatron_tokenformer.data import problems as kinds
from megatron_tokenformer.data.problems import Problem

_UTF8_BOM = b"\xef\xbb\xbf"


class Fields(NamedTuple):
    """What is wanted of a line."""

    json_key: str = "text"
    """where its text is"""
    split_by: str | None = None
    """where the name of its component is, keys joined by dots; None if that does not matter"""


class Parsed(NamedTuple):
    """The documents of some lines, and what was wrong with the others."""

    texts: list[str]
    """of the good lines, in order"""
    components: list[str]
    """of each text; empty without `Fields.split_by`"""
    problems: list[Problem]
    """one for each bad line"""


class BadLine(ValueError):
    """A line that gives no document; the arguments are the kind of the problem and the reason."""


def parse_lines(data: bytes, path: str, first_line: int, fields: Fields) -> Parsed:
    """Parse whole lines: one JSON object each; blank lines are skipped.

    Args:
        data: the lines.
        path: where they are from.
        first_line: the number of the first one, counted from 1.
        fields: what is wanted.
    """
    try:
        rows = _decode_all(data)
        texts = [row[fields.json_key] for row in rows]
        components = [component(row, fields.split_by) for row in rows] if fields.split_by else []
    except (orjson.JSONDecodeError, KeyError, TypeError, BadLine):
        texts, components = [None], []
    if all(isinstance(text, str) for text in texts):
        return Parsed(texts, components, [])
    # A blank line, a byte order mark, or a bad line.
    return _parse_carefully(data, path, first_line, fields)


def _decode_all(data: bytes) -> list[Any]:
    """The values of all lines, decoded where they are: a copy of each line would cost half as much again."""
    rows, view, start = [], memoryview(data), 0
    while start < len(data):
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        if end > start:
            rows.append(orjson.loads(view[start:end]))
        start = end + 1
    return rows


def document(row: Any, fields: Fields) -> tuple[str, str]:
    """The text and the component (`""` if that does not matter) of a decoded line.

    Raises:
        BadLine: it has not what is wanted.
    """
    key = fields.json_key
    if not isinstance(row, dict):
        found = type(row).__name__
        raise BadLine(kinds.NO_OBJECT, f"expected a JSON object with the key {key!r}, found {found}")
    if key not in row:
        names = ", ".join(repr(name) for name in list(row)[:20]) or "no keys"
        raise BadLine(kinds.NO_TEXT, f"no key {key!r}; the object has {names}")
    if not isinstance(row[key], str):
        found = type(row[key]).__name__
        raise BadLine(kinds.TEXT_NO_STRING, f"the value of {key!r} is {found}, not a string")
    return row[key], component(row, fields.split_by) if fields.split_by else ""


def component(row: Any, split_by: str) -> str:
    """The name at the dotted path `split_by` of a decoded line.

    Raises:
        BadLine: there is no such key, or its value is no name.
    """
    value = row
    for key in split_by.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, str) or not value:
        raise BadLine(kinds.NO_COMPONENT, f"no name at {split_by!r}")
    return value


def decode_line(line: bytes) -> Any:
    """The JSON value of a line.

    Raises:
        BadLine: invalid UTF-8 or malformed JSON.
    """
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        reason = str(error)
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte {line[error.start]:#04x} at column {error.start + 1} of the line"
        raise BadLine(kinds.INVALID_UTF8, f"invalid UTF-8: {where}") from None
    raise BadLine(kinds.MALFORMED_JSON, f"malformed JSON: {reason}")


def _parse_carefully(data: bytes, path: str, first_line: int, fields: Fields) -> Parsed:
    parsed = Parsed([], [], [])
    for number, line in numbered_lines(data, first_line):
        try:
            text, name = document(decode_line(line), fields)
        except BadLine as error:
            kind, reason = error.args
            parsed.problems.append(Problem(kind, f"{path}:{number}: {reason}"))
            continue
        parsed.texts.append(text)
        if fields.split_by:
            parsed.components.append(name)
    return parsed


def numbered_lines(data: bytes, first_line: int) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers, without a byte order mark before the first one."""
    if first_line == 1:
        data = data.removeprefix(_UTF8_BOM)
    for number, line in enumerate(data.split(b"\n"), first_line):
        if line and not line.isspace():
            yield number, line
