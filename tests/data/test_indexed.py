"""Token files are Megatron's to the byte, appear whole or not at all, and are checked when opened."""

from __future__ import annotations

import errno
import mmap
import struct
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tokenformer.data import index_layout, indexed, pair
from megatron_tokenformer.data.indexed import TokenFile, TokenFileWriter, token_dtype
from megatron_tokenformer.errors import UserError


def write(prefix: Path, documents: list[list[int]], dtype: type = np.uint16) -> str:
    """Write documents in two calls, so that both the first and a later one are used."""
    with TokenFileWriter(str(prefix), np.dtype(dtype)) as writer:
        for part in (documents[:2], documents[2:]):
            tokens = np.array([token for document in part for token in document], np.int64)
            writer.add(tokens, np.array([len(document) for document in part], np.int64))
        writer.finish()
    return str(prefix)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("documents", [1, 2, 700])
def test_bytes_equal_megatron_cores(
    tmp_path: Path, dtype: type, documents: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    # So that an index of a few hundred documents already takes several parts.
    monkeypatch.setattr(indexed, "PART", 256)
    generator = np.random.default_rng(documents)
    texts = [generator.integers(0, 60_000, generator.integers(1, 50)).tolist() for _ in range(documents)]
    ours = write(tmp_path / "ours", texts, dtype)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for text in texts:
        builder.add_item(torch.tensor(text))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    # Held in a variable: its rows are views of a map that it closes when it goes.
    reread = IndexedDataset(ours)
    assert [row.tolist() for row in reread[:]] == texts


def test_reads_documents_of_several_sequences(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.int32)
    builder.add_document(torch.arange(5), [2, 3])
    builder.end_document()
    builder.add_document(torch.arange(5, 9), [4])
    builder.finalize(str(tmp_path / "a.idx"))
    file = TokenFile(str(tmp_path / "a"))
    assert file.documents == 3
    assert file.document_lengths().tolist() == [5, 0, 4]
    assert file.window(0, 9).tolist() == list(range(9))


@settings(max_examples=30, deadline=None)
@given(documents=st.lists(st.lists(st.integers(0, 65_535), min_size=1, max_size=9), max_size=9))
def test_round_trip(documents: list[list[int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = TokenFile(write(Path(folder, "a"), documents))
        stream = [token for document in documents for token in document]
        assert (file.documents, file.tokens) == (len(documents), len(stream))
        assert file.window(0, file.tokens).tolist() == stream
        assert file.document_lengths().tolist() == [len(document) for document in documents]


@pytest.mark.parametrize("counts", [[1, 1, 1, 2, 1], [0, 1, 4, 0, 1], [1, 1, 1, 1, 2], [1] * 6])
def test_documents_of_several_sequences_are_megatron_cores(
    tmp_path: Path, counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    monkeypatch.setattr(indexed, "PART", 2)
    sequences = [list(range(10 * i, 10 * i + i + 1)) for i in range(6)]
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    at = 0
    for count in counts:
        for sequence in sequences[at : at + count]:
            builder.add_item(torch.tensor(sequence))
        builder.end_document()
        at += count
    builder.finalize(str(tmp_path / "theirs.idx"))
    with TokenFileWriter(str(tmp_path / "ours"), np.dtype(np.uint16)) as writer:
        # In two calls, of which the first has one sequence a document where the case allows it.
        half = sum(counts[:3])
        for part, documents in ((sequences[:half], counts[:3]), (sequences[half:], counts[3:])):
            writer.add(np.concatenate(part), np.array([*map(len, part)]), np.array(documents))
        writer.finish()
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    assert len(list(tmp_path.iterdir())) == 4


def test_appended_tables_that_do_not_add_up_are_refused(tmp_path: Path) -> None:
    with TokenFileWriter(str(tmp_path / "a"), np.dtype(np.uint16)) as writer:
        with pytest.raises(ValueError, match="documents of 2 sequences"):
            writer.add(np.array([1]), np.array([1]), np.array([2]))
        with pytest.raises(ValueError, match="int32 ids for a file of uint16"):
            writer.append_tokens(np.array([1], np.int32))
        writer.append_tokens(np.array([1, 2], np.uint16))
        with pytest.raises(ValueError, match="2 tokens"):
            writer.finish()
        writer.append_lengths(np.array([2]))
        with pytest.raises(ValueError, match="end at sequence 0 of 1"):
            writer.finish()
    assert list(tmp_path.iterdir()) == []


def test_a_new_pair_takes_the_old_description_away(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1]])
    (tmp_path / "a.json").write_text("{}")
    write(tmp_path / "a", [[2]])
    assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize("part", [1, 2, 3, 100])
def test_document_lengths_in_parts(tmp_path: Path, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents and sequences are cut into parts at different places; no token may fall between them."""
    monkeypatch.setattr(index_layout, "PART", part)
    monkeypatch.setattr(index_layout.parts, "__defaults__", (part,))
    sequences = np.array([2, 0, 0, 3, 1, 0, 4])
    lengths = np.arange(1, 11)
    with TokenFileWriter(str(tmp_path / "a"), np.dtype(np.uint16)) as writer:
        writer.add(np.arange(lengths.sum()), lengths, sequences)
        writer.finish()
    file = TokenFile(str(tmp_path / "a"))
    expected = [1 + 2, 0, 0, 3 + 4 + 5, 6, 0, 7 + 8 + 9 + 10]
    assert file.document_lengths().tolist() == expected
    for count in range(9):
        assert file.first_document_lengths(count).tolist() == expected[:count]
    with TokenFileWriter(str(tmp_path / "b"), np.dtype(np.uint16)) as writer:
        writer.add(np.array([], np.int64), np.array([], np.int64), np.array([0, 0]))
        writer.finish()
    assert TokenFile(str(tmp_path / "b")).document_lengths().tolist() == [0, 0]


def test_windows_outside_the_stream_are_refused(tmp_path: Path) -> None:
    file = TokenFile(write(tmp_path / "a", [[1, 2, 3]]))
    assert file.window(1, 2).tolist() == [2, 3]
    for start, length in ((-1, 1), (2, 2), (0, -1)):
        with pytest.raises(ValueError, match="window"):
            file.window(start, length)


def test_the_pages_of_an_expected_window_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = TokenFile(write(tmp_path / "a", [[0] * 3 * mmap.PAGESIZE]))
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(file, "_mapped", SimpleNamespace(madvise=lambda *given: asked.append(given)))
    for start, length in ((0, 3), (mmap.PAGESIZE - 1, 3), (mmap.PAGESIZE, 2 * mmap.PAGESIZE)):
        file.expect(start, length)
    page = mmap.PAGESIZE // 2  # in ids
    expected = [(0, 3), (page, page + 2), (2 * page, 4 * page)]
    assert asked == [(mmap.MADV_WILLNEED, 2 * first, 2 * count) for first, count in expected]


def test_a_hint_that_the_system_does_not_take_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    file = TokenFile(write(tmp_path / "a", [[1, 2, 3]]))
    monkeypatch.setattr(file, "_mapped", SimpleNamespace(madvise=refuse))
    file.expect(0, 3)
    assert file.window(0, 3).tolist() == [1, 2, 3]


def test_types_by_vocabulary() -> None:
    assert token_dtype(65_499) == np.uint16
    assert token_dtype(65_500) == np.int32


def test_ids_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with TokenFileWriter(str(tmp_path / "a"), np.dtype(np.uint16)) as writer:
        for tokens, lengths in (([65_536], [1]), ([-1], [1]), ([1, 2], [1])):
            with pytest.raises(ValueError, match=r"fit|add up"):
                writer.add(np.array(tokens), np.array(lengths))


def test_without_finish_nothing_is_left_and_an_old_pair_stays(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 2]])
    with pytest.raises(KeyError), TokenFileWriter(str(tmp_path / "a"), np.dtype(np.uint16)) as writer:
        writer.add(np.array([7]), np.array([1]))
        raise KeyError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]
    assert TokenFile(str(tmp_path / "a")).window(0, 2).tolist() == [1, 2]


def test_stopped_between_the_renames_no_old_index_describes_new_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a", [[1, 2]])
    replace, renamed = indexed.os.replace, []

    def stop_at_second(source: str, target: str) -> None:
        if renamed:
            raise KeyboardInterrupt
        renamed.append(target)
        replace(source, target)

    monkeypatch.setattr(indexed.os, "replace", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a", [[3, 4], [5]])
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_a_broken_pair_is_refused_at_open(tmp_path: Path) -> None:
    good = tmp_path / "good"
    write(good, [[1, 2, 3], [4, 5]])
    write(tmp_path / "other", [[1], [2]])
    tokens, index = (good.with_suffix(suffix).read_bytes() for suffix in (".bin", ".idx"))
    other = (tmp_path / "other.idx").read_bytes()
    cases = {
        "cut short, still being written": (tokens[:-1], index),
        "10 bytes, but its index .* describes 4": (tokens, other),
        "describes 10": (b"", index),
        "cut short or damaged": (tokens, index[:-4]),
        "first bytes are not MMIDIDX": (tokens, b"TNTIDX" + index[6:]),
        r"not a Megatron index": (tokens, index[:20]),
        "version 2": (tokens, index[:9] + struct.pack("<Q", 2) + index[17:]),
        "type code 99": (tokens, index[:17] + b"\x63" + index[18:]),
    }
    bad = tmp_path / "bad"
    for reason, (bad_tokens, bad_index) in cases.items():
        bad.with_suffix(".bin").write_bytes(bad_tokens)
        bad.with_suffix(".idx").write_bytes(bad_index)
        with pytest.raises(UserError, match=reason) as caught:
            TokenFile(str(bad))
        assert str(bad) in str(caught.value)


def test_an_unreadable_pair_is_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    prefix = write(tmp_path / "a", [[1]])
    # By hand, for the superuser that runs tests in containers may read everything.
    monkeypatch.setattr(pair, "read_index", deny)
    with pytest.raises(UserError, match=r"cannot read .*a\.idx: Permission denied"):
        TokenFile(prefix)


def test_a_missing_pair_says_what_is_there_instead(tmp_path: Path) -> None:
    write(tmp_path / "pile_text_document", [[1]])
    for guess in ("pile", "pile_text_document.bin", "pile_text_document.idx"):
        with pytest.raises(UserError, match=r"did you mean .*pile_text_document'"):
            TokenFile(str(tmp_path / guess))
    (tmp_path / "pile_text_document.idx").unlink()
    with pytest.raises(UserError, match=r"pile_text_document\.idx is missing"):
        TokenFile(str(tmp_path / "pile_text_document"))
