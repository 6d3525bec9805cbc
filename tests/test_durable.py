"""Files that are there after a crash, their locks, and whether a folder takes any."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from pathlib import Path

import pytest

from megatron_tokenformer.durable import naming, replace_durably, try_lock, unwritable


def test_a_small_file_holds_the_new_text_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    for text in ("old", "new \u00fc"):
        replace_durably(path, text)
        assert path.read_text("utf-8") == text
    assert os.listdir(tmp_path) == ["record.json"]


def test_a_failed_replacement_leaves_the_old_text_and_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "record.json"
    replace_durably(path, "old")

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left") as failed:
        replace_durably(path, "new")
    assert failed.value.filename == str(tmp_path / ".record.json.writing")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["record.json"]


def test_an_error_that_knows_its_file_keeps_it(tmp_path: Path) -> None:
    with pytest.raises(OSError) as failed, naming(tmp_path / "other"):
        (tmp_path / "missing").read_text()
    assert failed.value.filename == str(tmp_path / "missing")


def test_a_lock_belongs_to_one_open_file_until_that_is_closed(tmp_path: Path) -> None:
    first, second = (os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT) for _ in range(2))
    try:
        assert try_lock(first) is True
        assert try_lock(first) is True, "it is ours already"
        assert try_lock(second) is False
        os.close(first)
        assert try_lock(second) is True
    finally:
        os.close(second)


def test_a_file_system_without_locks_gives_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", fail)
    with open(tmp_path / "lock", "w") as file:
        assert try_lock(file.fileno()) is None


def test_a_folder_that_takes_files_is_left_as_it_was(tmp_path: Path) -> None:
    assert unwritable(tmp_path) is None
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("folder", ["missing", "/proc"])
def test_a_folder_that_takes_none_is_named_with_the_reason(tmp_path: Path, folder: str) -> None:
    words = unwritable(tmp_path / folder)
    assert words is not None
    assert words.startswith(f"nothing can be written in {tmp_path / folder} (")
    assert words.endswith(")") and "None" not in words


def test_a_read_only_disk_is_told_by_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(dir: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(dir / "tmp0"))

    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    assert unwritable(tmp_path) == f"nothing can be written in {tmp_path} (Read-only file system)"
