"""Hosts, and SLURM on them, for the tests of one file; a folder with a tiny run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.hosts import Hosts
from tests.cluster.needs import missing
from tests.cluster.slurm import Slurm, prepare
from tests.toy import toy_config

NAMES = ["login", "n1", "n2"]


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of this folder is `cluster`, and skipped where it cannot run; `make test-cluster` fails instead."""
    reason = missing()
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """A login host and two others, which reach each other by ssh."""
    made = Hosts(tmp_path_factory.mktemp("hosts"), NAMES)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A SLURM with two nodes."""
    folder = tmp_path_factory.mktemp("slurm")
    prepare(folder, NAMES)
    made = Hosts(folder, NAMES)
    try:
        yield Slurm(made)
    finally:
        made.stop()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The config of a run of ten quick steps in tmp_path."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(toy_config(tmp_path).model_dump(mode="json")))
    return path


def rows(folder: Path) -> list[dict[str, Any]]:
    """What a run has logged."""
    from megatron_tokenformer.metrics_file import read_rows

    return read_rows(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []
