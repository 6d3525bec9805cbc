"""The readers that docs/file-formats.md shows read what we write, and it names all that is in the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_tokenformer.checkpoint.manifest import STATES, Interval, read_manifest
from megatron_tokenformer.checkpoint.shards import IntervalReader
from megatron_tokenformer.checkpoint.store import find_checkpoint
from megatron_tokenformer.data.indexed import TokenFile
from tests.docs.pages import ROOT, code_blocks
from tests.ranks import run_ranks
from tests.toy import toy_config, train_toy, write_documents

PAGE = (ROOT / "docs/file-formats.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def shown() -> dict[str, Any]:
    """What the page's Python defines."""
    namespace: dict[str, Any] = {}
    for block in code_blocks("file-formats.md", "python"):
        exec(block, namespace)
    return namespace


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two tensor-parallel ranks, so that parameters lie in several shards."""
    folder = tmp_path_factory.mktemp("run")
    config = toy_config(folder, training={"steps": 2}, parallel={"tensor": 2})
    run_ranks(2, train_toy, config, tensor=2)
    return Path(config.run_dir)


def test_documents(shown: dict[str, Any], tmp_path: Path) -> None:
    prefix = write_documents(tmp_path, "some", documents=50)
    ours = TokenFile(prefix)
    found = list(shown["documents"](prefix))
    assert len(found) == ours.documents == 50
    assert np.concatenate(found).tolist() == np.fromfile(f"{prefix}.bin", ours.dtype).tolist()
    assert all(ids[-1] == 0 and not (ids[:-1] == 0).any() for ids in found)


@pytest.mark.parametrize("state", STATES)
def test_parameters(shown: dict[str, Any], run: Path, state: str) -> None:
    folder = find_checkpoint(run)
    manifest = read_manifest(folder)
    assert len(manifest.shards) == 2
    found = shown["parameters"](folder, state)
    reader = IntervalReader(folder, manifest)
    assert found.keys() == manifest.shapes.keys()
    for name, values in found.items():
        assert list(values.shape) == manifest.shapes[name]
        pieces = [piece.numpy() for _, piece in reader.read(Interval(name, 0, values.size), state)]
        assert np.array_equal(values.ravel(), np.concatenate(pieces))


def test_the_page_names_every_key_of_a_manifest(run: Path) -> None:
    stored = json.loads((find_checkpoint(run) / "manifest.json").read_text())
    table = PAGE.partition("### manifest.json")[2].partition("\n### ")[0]
    assert not [key for key in stored if f"`{key}`" not in table]
    assert not [key for key in stored["shards"][0] if f"`{key}`" not in table]


def test_the_page_names_every_key_of_the_metrics(run: Path) -> None:
    section = PAGE.partition("### metrics.jsonl")[2].partition("\n## ")[0]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert not {key for row in rows for key in row if f"`{key}`" not in section}
    assert any("grad_norm" in row for row in rows) and any("val_ppl" in row for row in rows)


def test_the_page_names_every_file_of_a_run(run: Path) -> None:
    assert not [path.name for path in run.iterdir() if f"`{path.name}" not in PAGE]
