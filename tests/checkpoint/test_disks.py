"""Disks that are really full and folders that really may not be written: saves and growths fail in words."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.growth import write_checkpoint
from megatron_tokenformer.checkpoint.store import complete_checkpoints
from megatron_tokenformer.commands.grow_checkpoint import main
from megatron_tokenformer.errors import run_cli
from megatron_tokenformer.parallel.layout import Layout
from tests.checkpoint.saves import manifest, open_saver, state, stored_value
from tests.ranks import run_ranks
from tests.toy import toy_config

NOBODY = 65534
PAGE = 4096
DISK_PAGES = 400
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x00020000, 0x4000, 0x40000
LARGER = "qkv=96,output=32,ffn=200"

may_mount = pytest.mark.skipif(
    subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0,
    reason="only root may mount a small disk; test_saving.py limits the size of files instead",
)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that any user reaches; pytest's own are root's alone."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o777)
    yield path
    shutil.rmtree(path)


def mount_small_disk(folder: Path) -> None:
    """Put a disk of DISK_PAGES there that only this process sees, and that goes with it."""
    libc = ctypes.CDLL(None, use_errno=True)
    folder.mkdir()
    for done in (
        libc.unshare(CLONE_NEWNS),
        libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None),
        libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, b"size=%d" % (DISK_PAGES * PAGE)),
    ):
        if done != 0:
            raise OSError(ctypes.get_errno(), "cannot mount a small disk")


def leave_room(ballast: Path, pages: int) -> None:
    """Fill the disk up to so many pages."""
    free = shutil.disk_usage(ballast.parent).free // PAGE - pages
    ballast.write_bytes(bytes(PAGE * free))
    assert shutil.disk_usage(ballast.parent).free == PAGE * pages


def drop_privileges() -> None:
    """Root may write anywhere, whatever a folder's permissions say."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def save_with_less_and_less_room(layout: Layout, folder: Path) -> list[str]:
    """Save at every step with another room, from none to enough; return what was said."""
    said: list[str] = []
    mount_small_disk(folder)
    ballast = folder / "ballast"
    with open_saver(layout, folder, said.append, keep_last=1, max_failures=1000) as saver:
        saver.start(manifest(layout, 1), state(layout, 1.0))
        saver.wait()
        shard = (folder / "step-00000001" / "rank-00000.safetensors").stat().st_size
        # None; half a shard; a shard, and then page by page what manifest and `latest` take.
        rooms = [0, shard // PAGE // 2, *range(shard // PAGE - 1, shard // PAGE + 8)]
        for step, room in enumerate(rooms, start=2):
            before = {path.name: stored_value(path) for path in complete_checkpoints(folder)}
            leave_room(ballast, room)
            saver.start(manifest(layout, step), state(layout, step))
            saver.wait()
            after = {path.name: stored_value(path) for path in complete_checkpoints(folder)}
            assert names(folder) == {"latest", "ballast", *after}, "something is left of a save"
            assert after == {f"step-{step:08d}": step} or before.items() <= after.items()
            ballast.unlink()
        saver.start(manifest(layout, 99), state(layout, 99.0), last=True)
        assert {path.name: stored_value(path) for path in complete_checkpoints(folder)} == {
            "step-00000099": 99.0
        }
    return said


@may_mount
def test_wherever_a_disk_becomes_full_a_save_fails_in_words_and_the_next_one_may_not(folder: Path) -> None:
    (said,) = run_ranks(1, save_with_less_and_less_room, folder / "disk")
    first, *rest, enough, last = said
    assert all(line.startswith("saved ") for line in (first, enough, last))
    failed = [line for line in rest if not line.startswith("saved ")]
    for line in failed:
        assert "not written: rank 0 on " in line and "No space left on device; training goes on" in line
    for place in ("rank-00000.safetensors", "manifest.json", "latest"):
        assert any(place in line for line in failed), f"the disk was never full at {place}"


def save_into_a_closed_folder(layout: Layout, folder: Path) -> list[str]:
    said: list[str] = []
    drop_privileges()
    checkpoints = folder / "checkpoints"
    with open_saver(layout, checkpoints, said.append) as saver:
        saver.start(manifest(layout, 1), state(layout, 1.0))
        saver.wait()
        for step, mode in ((2, 0o555), (3, 0o555), (4, 0o755)):
            checkpoints.chmod(mode)
            saver.start(manifest(layout, step), state(layout, step))
            saver.wait()
            saved = {"step-00000004"} if step == 4 else set()
            assert names(checkpoints) == {"latest", "step-00000001", *saved}
    assert [stored_value(path) for path in complete_checkpoints(checkpoints)] == [1.0, 4.0]
    return said


def test_a_folder_that_may_not_be_written_fails_a_save_in_words_until_it_may(folder: Path) -> None:
    (said,) = run_ranks(1, save_into_a_closed_folder, folder)
    assert [line.split()[0] for line in said] == ["saved", "warning:", "warning:", "saved"]
    for line in said[1:3]:
        assert f"{folder}/checkpoints/" in line and "Permission denied; training goes on" in line


def grow_in_words(words: list[str]) -> tuple[object, list[str]]:
    """The exit code of the tool, and what it prints as an error."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as ended:
        run_cli(lambda: main([*words, "--tokens", LARGER]))
    return ended.value.code, [line for line in errors.getvalue().splitlines() if line.startswith("error: ")]


def grow_without_permission(layout: Layout, source: Path, folder: Path) -> tuple[object, list[str]]:
    drop_privileges()
    folder.mkdir()
    folder.chmod(0o555)
    ended = grow_in_words(["--load", str(source), "--save", str(folder)])
    assert names(folder) == set()
    return ended


def test_a_growth_into_a_folder_that_may_not_be_written_ends_in_words(folder: Path) -> None:
    source = write_checkpoint(folder / "run", toy_config(folder), ranks=2)
    ((code, errors),) = run_ranks(1, grow_without_permission, source, folder / "grown")
    assert code == 1
    grown = folder / "grown"
    assert errors == [
        f"error: cannot grow {source} into {grown}: nothing can be written in {grown} (Permission denied); "
        f"give another --save"
    ]


def grow_on_a_full_disk(layout: Layout, source: Path, folder: Path) -> tuple[object, list[str]]:
    mount_small_disk(folder)
    leave_room(folder / "ballast", 20)
    ended = grow_in_words(["--load", str(source), "--save", str(folder)])
    assert names(folder) == {"ballast"}
    return ended


@may_mount
def test_a_growth_onto_a_full_disk_ends_in_words_and_leaves_nothing(folder: Path) -> None:
    source = write_checkpoint(folder / "run", toy_config(folder), ranks=2)
    ((code, errors),) = run_ranks(1, grow_on_a_full_disk, source, folder / "disk")
    assert code == 1
    (error,) = errors
    assert error.startswith(f"error: cannot grow {source} into {folder / 'disk'}: it takes ")
    assert error.endswith("81.92 kB are free; make room or give another --save")
