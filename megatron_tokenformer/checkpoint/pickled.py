"""Tensors in files of `torch.save`, which are pickles: read so that a stranger's file can run no code."""

from __future__ import annotations

import contextlib
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_tokenformer.errors import UserError, printable

_REFUSED_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


def read_tensors(path: Path, part: str | None = None) -> dict[str, Tensor]:
    """The tensors of a state dict by name; their numbers stay in the file until they are used.

    Files of before torch 1.6 cannot be mapped, and are read whole.

    Args:
        part: the entry of the stored mapping that is the state dict; None: all of it is.

    Raises:
        UserError: the file cannot be read, is damaged, or holds other things than tensors (exit code 1).
    """
    is_zip = zipfile.is_zipfile(path)
    try:
        damaged = _damaged_entry(path) if is_zip else None
        with _tensors_alone():
            stored = None if damaged else torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}", exit_code=1) from None
    except Exception as error:  # a damaged pickle fails in any way that one of torch's many steps can
        raise UserError(_in_words(path, str(error)), exit_code=1) from None
    if damaged:
        raise UserError(f"{path} is damaged: {printable(damaged)}", exit_code=1)
    if part is not None:
        stored = stored.get(part) if isinstance(stored, dict) else None
    if not isinstance(stored, dict) or not stored:
        inside = f"'{part}' in {path}" if part else str(path)
        raise UserError(f"{inside} is not a dict of tensors", exit_code=1)
    for name, value in stored.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            found = f"{type(value).__name__} under {printable(name)}"
            raise UserError(f"{path} holds a {found}, where only tensors are expected", exit_code=1)
    return stored


def _damaged_entry(path: Path) -> str | None:
    """The first entry of a zip that is not what its checksum says: torch does not look."""
    with zipfile.ZipFile(path) as file:
        return file.testzip()


@contextlib.contextmanager
def _tensors_alone() -> Iterator[None]:
    """Without what other libraries, such as megatron-core, have told torch that pickles may hold besides."""
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.add_safe_globals(allowed)


def _in_words(path: Path, error: str) -> str:
    refused = _REFUSED_GLOBAL.search(error)
    if refused:
        return (
            f"{path} asks for {refused[1]} besides tensors, and was not loaded, as that may run code; if you "
            f"trust it, save its tensors alone with the program that wrote it"
        )
    first = next(iter(error.strip().splitlines()), "")
    return f"{path} is damaged, or no file of torch.save: {printable(first)[:200]}"
