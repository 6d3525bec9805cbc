"""Documents inside a window: where each token is in its own, and the id that ends them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_tokenformer.data.documents import document_positions, end_of_document_id
from megatron_tokenformer.data.encode import Job
from megatron_tokenformer.data.preprocess import preprocess
from megatron_tokenformer.errors import UserError
from tests.toy import write_documents

KEY = "data.eod_mask_loss"


def test_an_end_belongs_to_its_document_and_the_next_token_starts_one() -> None:
    tokens = torch.tensor([[5, 6, 0, 7, 0, 0, 8, 9], [0, 5, 6, 7, 8, 9, 5, 0]])
    assert document_positions(tokens, eod_id=0).tolist() == [
        [0, 1, 2, 0, 1, 0, 0, 1],
        [0, 0, 1, 2, 3, 4, 5, 6],
    ]


@given(rows=st.lists(st.lists(st.integers(0, 2), min_size=7, max_size=7), min_size=1, max_size=3))
def test_positions_are_those_of_counting_one_by_one(rows: list[list[int]]) -> None:
    expected = []
    for row in rows:
        positions = [0]
        for before in row[:-1]:
            positions.append(0 if before == 2 else positions[-1] + 1)
        expected.append(positions)
    assert document_positions(torch.tensor(rows), eod_id=2).tolist() == expected


def preprocessed(folder: Path, name: str, append_eod: bool) -> str:
    texts = folder / "texts.jsonl"
    texts.write_text('{"text": "one"}\n{"text": "two"}\n')
    job = Job("ByteTokenizer", None, append_eod=append_eod)
    return preprocess([str(texts)], str(folder / name), job).datasets[0]["prefix"]


def test_the_id_is_the_one_that_preprocessing_appended(tmp_path: Path) -> None:
    prefixes = [preprocessed(tmp_path, name, append_eod=True) for name in ("a", "b")]
    assert end_of_document_id(prefixes, KEY) == 256


def test_documents_without_ends_are_refused(tmp_path: Path) -> None:
    bare = preprocessed(tmp_path, "bare", append_eod=False)
    with pytest.raises(
        UserError, match=r"bare_text_document was made without --append-eod, .*again with"
    ) as error:
        end_of_document_id([preprocessed(tmp_path, "a", append_eod=True), bare], KEY)
    assert KEY in str(error.value) and error.value.exit_code == 2


def test_a_dataset_without_a_description_is_refused(tmp_path: Path) -> None:
    prefix = preprocessed(tmp_path, "foreign", append_eod=True)
    Path(f"{prefix}.json").unlink()
    with pytest.raises(
        UserError, match=rf"foreign_text_document has no description .*{KEY}.*data\.eod_id=ID"
    ):
        end_of_document_id([prefix], KEY)


def test_datasets_that_do_not_agree_are_refused(tmp_path: Path) -> None:
    prefixes = [write_documents(tmp_path, "zero"), write_documents(tmp_path, "two", eod_id=2)]
    with pytest.raises(
        UserError, match=r"zero_text_document ends .* id 0, .*two_text_document with id 2; .*same"
    ):
        end_of_document_id(prefixes, KEY)


def test_a_description_without_the_id_is_damaged(tmp_path: Path) -> None:
    prefix = write_documents(tmp_path, "a")
    description = json.loads(Path(f"{prefix}.json").read_text())
    del description["tokenizer"]["eod_id"]
    Path(f"{prefix}.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"is damaged: tokenizer\.eod_id is None"):
        end_of_document_id([prefix], KEY)
