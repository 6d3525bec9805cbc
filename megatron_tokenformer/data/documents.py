"""Documents inside a window: the id that ends each, and the place of a token in its document."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_tokenformer.data.sidecar import read_sidecar, sidecar_path
from megatron_tokenformer.errors import UserError


def needed_eod_id(
    prefixes: Sequence[str], isolate_documents: bool, eod_mask_loss: bool, eod_id: int | None
) -> int | None:
    """The end-of-document id of all these datasets: as given, else as told; None if no option needs it.

    Raises:
        UserError: see `end_of_document_id`.
    """
    options = {"data.isolate_documents": isolate_documents, "data.eod_mask_loss": eod_mask_loss}
    needed_by = next((key for key, on in options.items() if on), None)
    if needed_by is None:
        return None
    return end_of_document_id(prefixes, needed_by) if eod_id is None else eod_id


def end_of_document_id(prefixes: Sequence[str], needed_by: str) -> int:
    """The id that ends every document of all these datasets, as their descriptions tell.

    Args:
        prefixes: at least one dataset.
        needed_by: the key of the configuration that asks, for the message.

    Raises:
        UserError: a dataset without a description or made without --append-eod, or two that do not agree.
    """
    ids = [_end_of_document_id(prefix, needed_by) for prefix in prefixes]
    for prefix, eod_id in zip(prefixes, ids):
        if eod_id != ids[0]:
            raise UserError(
                f"{prefixes[0]} ends documents with id {ids[0]}, {prefix} with id {eod_id}; {needed_by} "
                f"needs one id for all training and validation data: preprocess them with the same tokenizer"
            )
    return ids[0]


def _end_of_document_id(prefix: str, needed_by: str) -> int:
    description = read_sidecar(prefix)
    if description is None:
        raise UserError(
            f"{prefix} has no description {sidecar_path(prefix)}, and {needed_by} needs the id that ends its "
            f"documents; give it as data.eod_id=ID"
        )
    if description.get("append_eod") is not True:
        raise UserError(
            f"{prefix} was made without --append-eod, and {needed_by} needs documents that end with an id of "
            f"their own; preprocess it again with --append-eod, or set {needed_by}=false"
        )
    eod_id = description["tokenizer"].get("eod_id")
    if not isinstance(eod_id, int):
        raise UserError(f"{sidecar_path(prefix)} is damaged: tokenizer.eod_id is {eod_id!r}", exit_code=1)
    return eod_id


def document_positions(tokens: Tensor, eod_id: int) -> Tensor:
    """The place of each token in its document: 0 at the window's beginning and after each end of a document.

    Args:
        tokens: [b, s] ids; `eod_id` belongs to the document that it ends.

    Returns:
        [b, s] int64.
    """
    places = torch.arange(tokens.shape[1], device=tokens.device)
    after_an_end = torch.zeros_like(tokens, dtype=torch.bool)
    after_an_end[:, 1:] = tokens[:, :-1] == eod_id
    first = (places * after_an_end).cummax(dim=1).values  # where in the window the token's document starts
    return places - first
