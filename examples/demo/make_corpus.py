"""Build the demo's corpus from real text that every machine has: the code of Python's standard library.

Each file gives two documents: the code itself (PythonSource) and, if it has any, its docstrings
(PythonDocstrings).
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import orjson
import zstandard
from tqdm import tqdm

from megatron_tokenformer.errors import UserError, run_cli

OUTPUTS = ("train-00.jsonl.zst", "train-01.jsonl.zst", "validation.jsonl.zst")
VALIDATION_PERCENT = 5
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3"}


def source_files(root: Path) -> list[Path]:
    """The `.py` files under `root` without tests and installed packages, by relative path."""
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files, key=lambda file: file.relative_to(root).as_posix())


def docstrings(source: str) -> str:
    """All docstrings of a module, unindented, in the order of the code; "" if it does not parse."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    # ast.walk goes level by level; the line brings back the order in which a reader meets them.
    nodes = sorted(
        (node for node in ast.walk(tree) if isinstance(node, kinds)),
        key=lambda node: getattr(node, "lineno", 0),
    )
    found = (ast.get_docstring(node) for node in nodes)
    return "\n\n".join(text for text in found if text)


def output_of(path: str) -> str:
    """The output file for a module, by its path alone, so that both its documents stay together."""
    bucket = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") % 100
    return OUTPUTS[2] if bucket < VALIDATION_PERCENT else OUTPUTS[bucket % 2]


def documents(root: Path) -> Iterator[tuple[str, bytes, int]]:
    """Yield (output file, JSON line, bytes of text) for every document."""
    for file in tqdm(source_files(root), desc="corpus", unit="file"):
        try:
            source = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        path = file.relative_to(root).as_posix()
        for name, text in (("PythonSource", source), ("PythonDocstrings", docstrings(source))):
            if text:
                line = orjson.dumps({"text": text, "meta": {"pile_set_name": name, "path": path}})
                yield output_of(path), line + b"\n", len(text.encode())


def write_corpus(folder: Path) -> tuple[int, int]:
    """Write the three files into `folder`, all or none; returns the documents and their bytes of text."""
    folder.mkdir(parents=True, exist_ok=True)
    count = size = 0
    with ExitStack() as stack:
        writers = {}
        for name in OUTPUTS:
            file = stack.enter_context(open(folder / f"{name}.tmp", "wb"))
            writers[name] = stack.enter_context(zstandard.ZstdCompressor(level=6).stream_writer(file))
        for name, line, text_bytes in documents(Path(sysconfig.get_path("stdlib"))):
            writers[name].write(line)
            count, size = count + 1, size + text_bytes
    if count == 0:
        raise UserError("found no source files in this Python's standard library", exit_code=1)
    for name in OUTPUTS:
        os.replace(folder / f"{name}.tmp", folder / name)
    return count, size


def main() -> None:
    """Write the three files, or say that they are there already."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where the files go")
    folder = parser.parse_args().output
    if all((folder / name).exists() for name in OUTPUTS):
        print(f"{folder}: the corpus is there already")
        return
    try:
        count, size = write_corpus(folder)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or folder}: {error.strerror}", exit_code=1) from error
    print(f"{folder}: {count:,} documents, {size:,} bytes of text")


if __name__ == "__main__":
    run_cli(main)
