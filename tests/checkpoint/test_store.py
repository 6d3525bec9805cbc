"""The folder of checkpoints: what is kept, what is cleared away, and which one is found."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_tokenformer.checkpoint.manifest import MANIFEST
from megatron_tokenformer.checkpoint.store import (
    LATEST,
    clear_leftovers,
    complete_checkpoints,
    find_checkpoint,
    find_checkpoints,
    retain,
    step_name,
)
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
    retain(tmp_path, keep_last=1, keep_every=0, newest=written)
    assert (older.exists(), written.exists(), later.exists()) == (False, True, True)


def test_multiples_of_keep_every_stay_besides_the_last(tmp_path: Path) -> None:
    for step in range(100, 900, 100):
        checkpoint(tmp_path, step)
    retain(tmp_path, keep_last=2, keep_every=300, newest=tmp_path / step_name(800))
    kept = [path.name for path in complete_checkpoints(tmp_path)]
    assert kept == [step_name(step) for step in (300, 600, 700, 800)]


def test_steps_are_counted_as_numbers_not_as_names(tmp_path: Path) -> None:
    older, newest = checkpoint(tmp_path, 99_999_999), checkpoint(tmp_path, 100_000_000)
    retain(tmp_path, keep_last=1, keep_every=0, newest=newest)
    assert (older.exists(), newest.exists()) == (False, True)


@pytest.mark.parametrize(
    "spelling", ["checkpoints//", "./checkpoints/", "link", "link/", "../here/checkpoints"]
)
def test_however_a_folder_is_spelled_its_checkpoints_are_found_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    here = tmp_path / "here"
    for step in (1, 2, 3):
        checkpoint(here / "checkpoints", step)
    (here / "link").symlink_to("checkpoints")
    monkeypatch.chdir(here)
    folder = Path(spelling)
    retain(folder, keep_last=1, keep_every=2, newest=folder / step_name(3))
    assert [path.name for path in complete_checkpoints(folder)] == [step_name(2), step_name(3)]
    assert find_checkpoint(spelling).samefile(here / "checkpoints" / step_name(3))
    assert sorted(path.name for path in (here / "checkpoints").iterdir()) == [step_name(2), step_name(3)]


def test_what_dead_saves_left_is_cleared_away(tmp_path: Path) -> None:
    kept = checkpoint(tmp_path, 5)
    for name in (".step-00000005.replaced", ".step-00000006.writing", ".step-00000004.deleted"):
        checkpoint(tmp_path, 9).rename(tmp_path / name)
    clear_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]


def test_a_checkpoint_set_aside_for_one_that_did_not_come_gets_its_name_back(tmp_path: Path) -> None:
    checkpoint(tmp_path, 5).rename(tmp_path / ".step-00000005.replaced")
    clear_leftovers(tmp_path)
    assert find_checkpoint(tmp_path) == tmp_path / step_name(5)


def test_latest_is_believed_only_if_it_names_a_complete_checkpoint(tmp_path: Path) -> None:
    good, torn = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2, complete=False)
    (tmp_path / LATEST).write_text(torn.name + "\n")
    assert find_checkpoint(tmp_path) == good


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b".",
        b"../elsewhere/step-00000009",
        b"{outside}",
        b"step-00000007",
        "step-0000000\u0662".encode(),
        b"\xff\xfe",
        b"step-00000002\0",
        b"step-" + b"9" * 10_000,
    ],
)
def test_latest_leads_nowhere_else(tmp_path: Path, content: bytes) -> None:
    outside = checkpoint(tmp_path / "elsewhere", 9)
    newest = [checkpoint(tmp_path / "here", step) for step in (1, 2)][-1]
    (tmp_path / "here" / LATEST).write_bytes(content.replace(b"{outside}", bytes(outside)))
    assert find_checkpoint(tmp_path / "here") == newest


def test_a_folder_or_a_pipe_in_the_place_of_latest_is_passed_over(tmp_path: Path) -> None:
    newest = checkpoint(tmp_path, 1)
    os.mkfifo(tmp_path / LATEST)
    assert find_checkpoint(tmp_path) == newest
    (tmp_path / LATEST).unlink()
    (tmp_path / LATEST).mkdir()
    assert find_checkpoint(tmp_path) == newest


def test_what_latest_names_comes_first_then_the_newest(tmp_path: Path) -> None:
    one, two, three, four = (checkpoint(tmp_path, step) for step in (1, 2, 3, 4))
    (tmp_path / LATEST).write_text(two.name + "\n")
    assert find_checkpoints(tmp_path) == [two, four, three, one]
    assert find_checkpoints(three) == [three]


def test_other_names_than_ours_are_no_checkpoints(tmp_path: Path) -> None:
    for name in ("step-1", "step-00000001x", "step-0000000\u0662", "step-" + "9" * 100, ".step-00000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MANIFEST).write_text("{}")
    assert complete_checkpoints(tmp_path) == []


def test_of_a_checkpoint_that_was_put_elsewhere_only_the_link_is_deleted(tmp_path: Path) -> None:
    elsewhere, folder = checkpoint(tmp_path / "elsewhere", 1), tmp_path / "here"
    newest = checkpoint(folder, 2)
    (folder / step_name(1)).symlink_to(elsewhere)
    retain(folder, keep_last=1, keep_every=0, newest=newest)
    assert [path.name for path in folder.iterdir()] == [newest.name]
    assert (elsewhere / MANIFEST).exists()


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
