"""Opening a pair costs the same at any size, finds damage at its ends, and later changes of its files."""

from __future__ import annotations

import errno
import os
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_tokenformer.data.index_layout import HEADER, MAGIC
from megatron_tokenformer.data.indexed import TokenFile, TokenFileWriter
from megatron_tokenformer.data.inspection import inspect_dataset
from megatron_tokenformer.data.pair import EDGE_BYTES, open_pair
from megatron_tokenformer.errors import UserError
from tests.descriptions import describe

# Three documents of one sequence each: where the tables of their index begin.
LENGTHS = [3, 4, 5]
POINTERS_AT, BOUNDARIES_AT = 34 + 4 * 3, 34 + 12 * 3


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """A described pair of three documents that was written long ago."""
    with TokenFileWriter(str(tmp_path / "d"), np.dtype(np.uint16)) as writer:
        writer.add(np.arange(sum(LENGTHS)), np.array(LENGTHS))
        writer.finish()
    for suffix in (".bin", ".idx"):
        os.utime(f"{tmp_path}/d{suffix}", (1_000_000_000, 1_000_000_000))
    return describe(str(tmp_path / "d"))


def put(suffix: str, at: int, form: str, value: int) -> Callable[[str], None]:
    """Write one number into a file of the pair."""

    def harm(prefix: str) -> None:
        with open(prefix + suffix, "r+b") as file:
            file.seek(at)
            file.write(struct.pack(form, value))

    return harm


def resize(suffix: str, by: int) -> Callable[[str], None]:
    def harm(prefix: str) -> None:
        os.truncate(prefix + suffix, os.path.getsize(prefix + suffix) + by)

    return harm


def misdescribe(key: str, value: object) -> Callable[[str], None]:
    def harm(prefix: str) -> None:
        describe(prefix, **{key: value})

    return harm


DAMAGES = {
    "is not a Megatron index": put(".idx", 0, "<B", 0),
    "index version 2": put(".idx", 9, "<Q", 2),
    "token type code 99": put(".idx", 17, "<B", 99),
    "4 sequences and 4 document boundaries need 114": put(".idx", 18, "<Q", 4),
    "cut short or damaged": resize(".idx", -1),
    "has 25 bytes, but its index .* describes 24": resize(".bin", 1),
    "has 22 bytes, but its index .* describes 24": resize(".bin", -2),
    "describes 22": put(".idx", 34 + 8, "<i", 4),
    "describes 10": put(".idx", POINTERS_AT + 16, "<q", 0),
    "pointer of the first sequence is 2, not 0": put(".idx", POINTERS_AT, "<q", 2),
    "first document begins at sequence 1, not at 0": put(".idx", BOUNDARIES_AT, "<q", 1),
    "last document ends at sequence 2 of 3": put(".idx", BOUNDARIES_AT + 24, "<q", 2),
    "describes other data: it says documents 4, the pair has 3": misdescribe("documents", 4),
    "describes other data: it says tokens 11, the pair has 12": misdescribe("tokens", 11),
    "describes other data: it says dtype int32, the pair has uint16": misdescribe("dtype", "int32"),
}


@pytest.mark.parametrize("words", DAMAGES)
def test_damage_that_costs_nothing_to_find_is_refused_by_name(prefix: str, words: str) -> None:
    open_pair(prefix)
    DAMAGES[words](prefix)
    with pytest.raises(UserError, match=words) as refused:
        open_pair(prefix)
    said = str(refused.value)
    assert refused.value.exit_code == 1
    assert said.startswith(f"{prefix} is damaged: ")
    assert f"tokenformer inspect_dataset {prefix}`" in said
    assert inspect_dataset(prefix).damages, "the tool that it points at must tell it as well"


def test_a_bin_of_no_whole_number_of_ids_is_refused(prefix: str) -> None:
    put(".idx", POINTERS_AT + 16, "<q", 15)(prefix)
    resize(".bin", 1)(prefix)
    with pytest.raises(UserError, match="has 25 bytes, not a whole number of uint16 ids"):
        open_pair(prefix)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"documents": 3, "tokens": 12, "tokenizer": {}}'])
def test_a_description_that_is_none_is_refused(prefix: str, content: str) -> None:
    Path(f"{prefix}.json").write_text(content)
    with pytest.raises(UserError, match=r"d\.json is damaged: not a description") as refused:
        open_pair(prefix)
    assert refused.value.exit_code == 1


@pytest.mark.parametrize(
    "changes", [{"model": 5}, {"eod_id": "0"}, {"fingerprint": None}, {"vocab_size": "9"}]
)
def test_a_tokenizer_that_a_checkpoint_could_not_record_is_refused(
    prefix: str, changes: dict[str, object]
) -> None:
    describe(prefix, tokenizer=changes)
    with pytest.raises(UserError, match=r"d\.json is damaged"):
        open_pair(prefix)


def replace_by_copy(path: str) -> None:
    """Another inode with the same content and the same time, as `rsync -t` leaves it."""
    shutil.copy2(path, f"{path}.new")
    os.replace(f"{path}.new", path)


def replace_by_other(path: str) -> None:
    """Another inode with other content of the same size and time."""
    before = os.stat(path)
    Path(f"{path}.new").write_bytes(Path(path).read_bytes()[::-1])
    os.utime(f"{path}.new", ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(f"{path}.new", path)


def replace_by_later(path: str) -> None:
    replace_by_copy(path)
    os.utime(path)


def rewrite_in_place(path: str) -> None:
    content = Path(path).read_bytes()
    with open(path, "r+b") as file:
        file.write(content[::-1])


CHANGES = [
    ("is another file now", replace_by_other),
    ("is another file now", replace_by_later),
    ("was written to", rewrite_in_place),
    ("bytes and has 3", lambda path: os.truncate(path, 3)),
    ("No such file", os.remove),
]


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize(("words", "change"), CHANGES)
def test_files_that_change_while_they_are_read_are_found(
    prefix: str, suffix: str, words: str, change: Callable[[str], None]
) -> None:
    file = TokenFile(prefix)
    file.pair.check_unchanged()
    change(prefix + suffix)
    with pytest.raises(UserError, match=words) as refused:
        file.pair.check_unchanged()
    assert refused.value.exit_code == 1
    assert str(refused.value).startswith(f"{prefix} was changed or replaced while the run was reading it (")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_another_inode_with_the_same_content_is_no_change(prefix: str, suffix: str) -> None:
    pair = open_pair(prefix)
    os.link(prefix + suffix, f"{prefix}.first")  # or its inode might be given to a later file
    replace_by_copy(prefix + suffix)
    pair.check_unchanged()
    replace_by_other(prefix + suffix)
    with pytest.raises(UserError, match="is another file now"):
        pair.check_unchanged()


@pytest.mark.parametrize("error", [errno.ESTALE, errno.EIO, errno.ENOTCONN])
def test_a_file_system_that_does_not_answer_is_told_of_once_and_asked_again(
    prefix: str, error: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = open_pair(prefix)
    answer = os.stat

    def fail(path: str) -> os.stat_result:
        if path == f"{prefix}.bin":
            raise OSError(error, os.strerror(error), path)
        return answer(path)

    monkeypatch.setattr(os, "stat", fail)
    pair.check_unchanged()
    assert capsys.readouterr().err == (
        f"warning: {prefix}.bin: whether it was changed cannot be told now ({os.strerror(error)})\n"
    )
    pair.check_unchanged()
    assert capsys.readouterr().err == ""
    rewrite_in_place(f"{prefix}.idx")
    with pytest.raises(UserError, match=r"\.idx was written to"):
        pair.check_unchanged()
    rewrite_in_place(f"{prefix}.bin")
    monkeypatch.setattr(os, "stat", answer)
    with pytest.raises(UserError, match=r"\.bin was written to"):
        pair.check_unchanged()


def test_a_new_file_that_cannot_be_read_is_told_of_and_looked_at_again(
    prefix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = open_pair(prefix)
    replace_by_other(f"{prefix}.bin")

    def fail(path: str) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    with monkeypatch.context() as patched:
        patched.setattr("megatron_tokenformer.data.pair._digest", fail)
        pair.check_unchanged()
    assert capsys.readouterr().err.startswith(f"warning: {prefix}.bin: whether it was changed cannot be told")
    with pytest.raises(UserError, match="is another file now"):
        pair.check_unchanged()


def test_reading_changes_nothing(prefix: str) -> None:
    file = TokenFile(prefix)
    assert file.window(0, file.tokens).tolist() == list(range(12))
    file.pair.check_unchanged()


def sparse_pair(prefix: Path, documents: int, length: int) -> str:
    """A pair of holes, sound at its ends, of documents of `length` tokens as far as the ends tell."""
    with open(f"{prefix}.idx", "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, documents, documents + 1))
        for at, form, value in (
            (34 + 4 * (documents - 1), "<i", length),
            (34 + 12 * documents - 8, "<q", 2 * length * (documents - 1)),
            (34 + 12 * documents + 8 * documents, "<q", documents),
        ):
            file.seek(at)
            file.write(struct.pack(form, value))
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * length * documents)
    return str(prefix)


def cost_of_opening(prefix: str) -> tuple[int, int]:
    """Bytes read from files, and peak of memory, of opening a pair."""

    def bytes_read() -> int:
        told = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(told["rchar"])

    tracemalloc.start()
    before = bytes_read()
    TokenFile(prefix)
    read, (_, peak) = bytes_read() - before, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return read, peak


def test_opening_a_hundred_million_documents_costs_what_ten_thousand_do(tmp_path: Path) -> None:
    small = sparse_pair(tmp_path / "small", 10_000, 100)
    large = sparse_pair(tmp_path / "large", 100_000_000, 100)
    cost_of_opening(small)  # what is read and kept at the first time only
    (read, memory), (large_read, large_memory) = cost_of_opening(small), cost_of_opening(large)
    assert TokenFile(large).tokens == 10**10
    assert large_read <= read + 10_000
    assert large_memory <= memory + 10_000
    assert large_read < 4 * EDGE_BYTES + 100_000


def test_copies_are_identical_and_what_differs_at_an_end_is_not(prefix: str, tmp_path: Path) -> None:
    long = str(tmp_path / "long")
    with TokenFileWriter(long, np.dtype(np.uint16)) as writer:
        writer.add(np.arange(200_000) % 1000, np.full(2000, 100))
        writer.finish()
    copy = str(tmp_path / "copy")
    for suffix in (".bin", ".idx"):
        shutil.copy(long + suffix, copy + suffix)
    expected = open_pair(long).identity
    assert (expected.documents, expected.tokens) == (2000, 200_000)
    assert open_pair(copy).identity == expected
    assert open_pair(prefix).identity != expected
    for place in (0, EDGE_BYTES - 2, 400_000 - EDGE_BYTES, 400_000 - 2):
        shutil.copy(f"{long}.bin", f"{copy}.bin")
        put(".bin", place, "<H", 1001)(copy)
        assert open_pair(copy).identity != expected, place
    shutil.copy(f"{long}.bin", f"{copy}.bin")
    put(".idx", 34, "<i", 99)(copy)
    assert open_pair(copy).identity != expected
