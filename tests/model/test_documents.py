"""Documents that are isolated from each other inside a window."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_tokenformer.data.documents import document_positions
from megatron_tokenformer.model.attention import _kept_tables, rotate, same_document
from megatron_tokenformer.parallel.collectives import TensorParallel
from tests.model.test_language_model import MODEL, build, reference_logits

END = 0
DOCUMENTS = [[slice(0, 5), slice(5, 6), slice(6, 16)], [slice(0, 9), slice(9, 13), slice(13, 16)]]


def some_documents() -> Tensor:
    """Two windows [2, 16] whose documents are DOCUMENTS; the last of each goes on beyond the window."""
    tokens = torch.randint(1, MODEL.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    for row, documents in enumerate(DOCUMENTS):
        for document in documents[:-1]:
            tokens[row, document.stop - 1] = END
    return tokens


def test_the_mask_is_causal_inside_a_document() -> None:
    assert same_document(torch.tensor([[0, 1, 0, 1, 2]]))[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_editing_a_document_leaves_the_next_ones_logits_bit_identical(dtype: torch.dtype) -> None:
    module, tokens = build().to(dtype), some_documents()
    edited = tokens.clone()
    edited[0, 2] = tokens[0, 2] % (MODEL.vocab_size - 1) + 1
    first, later = DOCUMENTS[0][0], slice(DOCUMENTS[0][0].stop, None)
    positions = document_positions(tokens, END)
    before, after = module(tokens, positions)[:, 0], module(edited, positions)[:, 0]
    assert torch.equal(before[later], after[later])
    assert not torch.equal(before[first], after[first])
    assert not torch.equal(module(tokens)[later, 0], module(edited)[later, 0]), "without positions it shows"


def test_each_document_is_as_if_alone_in_the_plain_reference() -> None:
    module, tokens = build(), some_documents()
    weights = dict(module.named_parameters())
    logits = module(tokens, document_positions(tokens, END)).transpose(0, 1)
    for row, documents in enumerate(DOCUMENTS):
        for document in documents:
            alone = reference_logits(weights, tokens[row : row + 1, document], MODEL)[0]
            torch.testing.assert_close(logits[row, document], alone, rtol=1e-5, atol=1e-5)


def test_each_document_is_rotated_from_position_0_on() -> None:
    """Seen here only: attention depends on differences of positions, so the logits would not tell."""
    x = torch.randn(2, 3, 16, 8, generator=torch.Generator().manual_seed(1))
    turned = rotate(x, 4, document_positions(some_documents(), END))
    for row, documents in enumerate(DOCUMENTS):
        for document in documents:
            assert torch.equal(turned[row, :, document], rotate(x[row, :, document], 4))


def test_positions_of_one_document_change_nothing() -> None:
    module, tokens = build(TensorParallel()), some_documents()
    positions = torch.arange(16).expand(2, 16)
    torch.testing.assert_close(module(tokens, positions), module(tokens), rtol=1e-12, atol=1e-12)


def test_what_inference_has_kept_can_be_trained_with() -> None:
    """Masks and rotary tables are kept; made in inference mode they could not be saved for backward."""
    module, tokens = build(), some_documents()
    positions = document_positions(tokens, END)
    _kept_tables.cache_clear()
    with torch.inference_mode():
        expected = module(tokens, positions)
    logits = module(tokens, positions)
    logits.sum().backward()
    assert torch.equal(logits, expected)
