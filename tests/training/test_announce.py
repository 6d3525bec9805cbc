"""What a run says of its data when it starts."""

from __future__ import annotations

from megatron_tokenformer.data.batches import SourceInfo
from megatron_tokenformer.data.provenance import TokenizerRecord
from megatron_tokenformer.training.announce import data_table, data_warnings

TOKENIZER = TokenizerRecord("ByteTokenizer", "0" * 64, 257)
WEB = SourceInfo("data/web", 0.75, 10_000, 1_000_001, TOKENIZER)
BOOKS = SourceInfo("books", 0.25, 500, 50_099, TOKENIZER)
BARE = SourceInfo("data/bare", 1.0, 10, 1001, None)


def test_the_table_says_what_is_drawn_from_each_source_and_in_all() -> None:
    assert data_table([WEB, BOOKS], samples=4000, sequence_length=100) == [
        "data        share     tokens  drawn in this run  epochs",
        "data/web   75.00%  1,000,001            300,000    0.30",
        "books      25.00%     50,099            100,000    2.00",
        "total     100.00%  1,050,100            400,000    0.38",
    ]


def test_one_source_needs_no_total() -> None:
    assert data_table([BARE], samples=5, sequence_length=100) == [
        "data         share  tokens  drawn in this run  epochs",
        "data/bare  100.00%   1,001                500    0.50",
    ]


def test_sources_seen_more_than_four_times_are_told_in_one_line() -> None:
    assert data_warnings([WEB, BOOKS], [], samples=8000, evaluated=0) == []
    assert data_warnings([WEB, BOOKS], [], samples=8001, evaluated=0) == [
        "warning: seen more than 4 times in this run, and worth less each time: books (4.0)"
    ]
    assert data_warnings([WEB, BOOKS], [], samples=100_000, evaluated=0) == [
        "warning: seen more than 4 times in this run, and worth less each time: data/web (7.5), books (50.0)"
    ]


def test_sources_that_cannot_be_checked_are_told_in_one_line_and_once() -> None:
    assert data_warnings([WEB, BARE], [BARE, BARE._replace(prefix="more")], samples=1, evaluated=1) == [
        "note: no .json, so vocabulary and tokenizer cannot be checked: data/bare, more"
    ]


def test_an_evaluation_larger_than_its_data_is_told() -> None:
    assert data_warnings([WEB], [BOOKS], samples=1, evaluated=500) == []
    assert data_warnings([WEB], [BOOKS], samples=1, evaluated=501) == [
        "note: an evaluation takes 501 samples, some twice: there are 500"
    ]
