"""The tokenizer of a model as files of transformers, if those give the ids that the data was made with."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_tokenformer.checkpoint.portable import PortableModel
from megatron_tokenformer.config.schema import Tokenizer
from megatron_tokenformer.data.hf_tokenizer import read_definition
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.evaluation.load import open_tokenizer

SAMPLES = (
    "",
    "The quick brown fox jumps over the lazy dog.",
    "  Two  spaces,\n\nlines,\r\n\ttabs;   and an end ",
    "don't you'll I'VE 1234567890 3.14 a_b == c[i] // {x: 'y'}",
    "Naïve café — “Größe” €5 Привет 你好 नमस्ते 🙂👩‍👩‍👧",
)
"""on which both must agree; that a text spells a special token is left out"""
FAST = {"HFTokenizer", "GPT2BPETokenizer"}


@dataclass(frozen=True)
class ExportedTokenizer:
    """What became of a tokenizer."""

    eod_id: int | None
    """the id that ends documents, where it is known"""
    told: str
    """what became of it, in a line"""


def write_tokenizer(portable: PortableModel, folder: Path) -> ExportedTokenizer:
    """Write the files of a model's tokenizer into its new folder, or say why there are none."""
    tokenizer = portable.tokenizer
    if tokenizer is None:
        return ExportedTokenizer(None, "tokenizer: none, the checkpoint names none")
    eod_id = None
    try:
        ours = open_tokenizer(tokenizer, portable.model.vocab_size, portable.made_with)
        eod_id = ours.eod_id
        with tempfile.TemporaryDirectory() as scratch:
            backend = _backend(tokenizer, Path(scratch))
            end = backend.id_to_token(eod_id)
            PreTrainedTokenizerFast(
                tokenizer_object=backend,
                bos_token=end,
                eos_token=end,
                model_max_length=portable.sequence_length,
                padding_side="left",
                clean_up_tokenization_spaces=False,
            ).save_pretrained(scratch)
            theirs = AutoTokenizer.from_pretrained(scratch)
            for text in SAMPLES:
                if theirs(text, verbose=False)["input_ids"] != ours.encode(text):
                    raise UserError(f"in transformers it gives other ids, as for {text!r}")
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(Path(scratch, name), folder)
    except UserError as error:
        return ExportedTokenizer(eod_id, f"tokenizer: not exported ({tokenizer.type}): {error}")
    return ExportedTokenizer(eod_id, f"tokenizer: {tokenizer.model} as tokenizer.json, {end} = {eod_id}")


def _backend(tokenizer: Tokenizer, scratch: Path) -> Backend:
    """The tokenizer as one of the `tokenizers` library."""
    if tokenizer.type in FAST:
        backend = Backend.from_buffer(read_definition(str(tokenizer.model), tokenizer.merges))
        backend.no_truncation()
        backend.no_padding()
        return backend
    if tokenizer.type == "SentencePieceTokenizer":
        shutil.copy(str(tokenizer.model), scratch / "tokenizer.model")
        try:
            return PreTrainedTokenizerFast.from_pretrained(scratch).backend_tokenizer
        except Exception as error:  # of its converters, which raise anything
            raise UserError(f"transformers cannot convert it: {error}") from None
    raise UserError("transformers has no form of it")
