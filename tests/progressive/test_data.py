"""Data that a later stage would miss are told before the first one begins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_tokenformer.errors import UserError
from megatron_tokenformer.progressive import __main__ as machine
from tests.toy import write_tokens

Tree = dict[str, Any]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages of every machine that begins its work; it does none."""
    names: list[str] = []
    monkeypatch.setattr(machine, "run_stages", lambda it: names.extend(s.name for s in it.plan.stages))
    return names


@pytest.fixture
def path(schedule: Tree, write: Callable[[Tree], Path], tmp_path: Path) -> str:
    """A schedule whose last stage alone reads data that are not there."""
    there = write_tokens(tmp_path)
    schedule["common"]["data"] |= {"train": there, "validation": there}
    schedule["stages"][2]["config"]["data"] = {"train": str(tmp_path / "tyo_text_document")}
    return str(write(schedule))


def test_a_stage_without_its_data_is_named(path: str, tmp_path: Path, started: list[str]) -> None:
    with pytest.raises(UserError, match=r"stage 'c': no data at .*/tyo_text_document") as told:
        machine.main(["--config", path])
    assert told.value.exit_code == 2 and started == []


def test_only_what_is_asked_for_is_looked_for(path: str, started: list[str]) -> None:
    assert machine.main(["--config", path, "--stage", "b"]) == 0
    assert started == ["a", "b", "c"]


def test_other_hosts_may_have_them(path: str, started: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", path, "--launcher", "deepspeed", "launch.hostfile=hosts"]
    assert machine.main(words) == 0
    assert "warning: stage 'c': no data at " in capsys.readouterr().err
    assert started == ["a", "b", "c"]
