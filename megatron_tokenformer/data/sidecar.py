"""The description beside a pair, `PREFIX.json`: counts, tokenizer, inputs.  Megatron-LM writes none."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_tokenformer.durable import write_durably
from megatron_tokenformer.errors import UserError


def sidecar_path(prefix: str) -> str:
    """The name of the description of `prefix`."""
    return f"{prefix}.json"


def read_sidecar(prefix: str) -> dict[str, Any] | None:
    """The description of `prefix`, or None if there is none.

    Raises:
        UserError: it is not a JSON object with counts and a tokenizer.
    """
    path = sidecar_path(prefix)
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        tokenizer = found["tokenizer"]
        counts = found["documents"], found["tokens"], tokenizer["vocab_size"]
        names = tokenizer["type"], tokenizer["fingerprint"]
        complete = all(isinstance(n, int) for n in counts) and all(isinstance(name, str) for name in names)
        # A tokenizer without a file has no model.
        complete = complete and isinstance(tokenizer.get("model"), str | None)
        complete = complete and isinstance(tokenizer.get("eod_id"), int | None)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", exit_code=1) from error
    except (ValueError, KeyError, TypeError):
        complete = False
    if not complete:
        raise UserError(f"{path} is damaged: not a description with counts and a tokenizer", exit_code=1)
    return found


def merge_sidecars(sidecars: list[dict[str, Any]], prefix: str) -> dict[str, Any]:
    """What one pass over the inputs of all would have written: counts summed, lists of inputs joined.

    Keys are kept in the order of the first description.  What is neither a count nor a list stays where all
    agree and goes where they differ, for it then describes none of the whole.
    """
    # A tokenizer's numbers are no counts; that it is the same everywhere is for the caller to see to.
    return _merge(sidecars, {"prefix": prefix, "tokenizer": sidecars[0]["tokenizer"]})


def _merge(found: list[dict[str, Any]], known: dict[str, Any]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for key in {key: None for one in found for key in one}:
        values = [one[key] for one in found if key in one]
        if key in known:
            merged[key] = known[key]
        elif all(isinstance(value, int) and not isinstance(value, bool) for value in values):
            merged[key] = sum(values)
        elif all(isinstance(value, list) for value in values):
            merged[key] = [item for value in values for item in value]
        elif all(isinstance(value, dict) for value in values):
            merged[key] = _merge(values, {})
        elif len(values) == len(found) and all(value == values[0] for value in values):
            merged[key] = values[0]
    return merged


def write_sidecar(prefix: str, content: dict[str, Any]) -> None:
    """Write a description durably under a temporary name, to be there before the pair gets its own."""
    temporary = f"{sidecar_path(prefix)}.tmp"
    try:
        write_durably(Path(temporary), json.dumps(content, indent=2) + "\n")
    except BaseException:
        discard_sidecar(prefix)
        raise


def publish_sidecar(prefix: str) -> None:
    """Give a description that was written its name, if it has not got it already."""
    path = sidecar_path(prefix)
    if os.path.exists(f"{path}.tmp"):
        os.replace(f"{path}.tmp", path)


def discard_sidecar(prefix: str) -> None:
    """Remove a description that has not got its name."""
    with suppress(FileNotFoundError):
        os.remove(f"{sidecar_path(prefix)}.tmp")
