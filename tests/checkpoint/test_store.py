"""The folder of checkpoints: what is kept, what is cleared away, and which one is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_tokenformer.checkpoint.manifest import MANIFEST
from megatron_tokenformer.checkpoint.store import LATEST, find_checkpoint, retain, step_name
from megatron_tokenformer.errors import UserError


def checkpoint(folder: Path, step: int, complete: bool = True) -> Path:
    """A folder that looks like the checkpoint of a step."""
    path = folder / step_name(step)
    path.mkdir(parents=True)
    (path / "rank-00000.safetensors").write_bytes(b"")
    if complete:
        (path / MANIFEST).write_text("{}")
    return path


def test_older_ones_go_and_later_ones_that_were_passed_over_stay(tmp_path: Path) -> None:
    older, written, later = (checkpoint(tmp_path, step) for step in (2000, 2500, 3000))
    retain(tmp_path, keep_last=1, newest=written)
    assert (older.exists(), written.exists(), later.exists()) == (False, True, True)


def test_what_dead_saves_left_is_cleared_away(tmp_path: Path) -> None:
    written = checkpoint(tmp_path, 5)
    for name in (".step-00000003.writing", ".step-00000004.replaced"):
        (tmp_path / name).mkdir()
    retain(tmp_path, keep_last=2, newest=written)
    assert [path.name for path in tmp_path.iterdir()] == [written.name]


def test_latest_is_believed_only_if_it_names_a_complete_checkpoint(tmp_path: Path) -> None:
    good, torn = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2, complete=False)
    (tmp_path / LATEST).write_text(torn.name + "\n")
    assert find_checkpoint(tmp_path) == good


@pytest.mark.parametrize("inside", ["", "checkpoints"])
def test_a_run_its_checkpoints_or_one_of_them_can_be_named(tmp_path: Path, inside: str) -> None:
    folder = tmp_path / inside
    one, two = checkpoint(folder, 1), checkpoint(folder, 2)
    (folder / LATEST).write_text(one.name + "\n")
    assert find_checkpoint(tmp_path) == find_checkpoint(folder) == one
    assert find_checkpoint(two) == two


def test_none_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no complete checkpoint at"):
        find_checkpoint(tmp_path)
