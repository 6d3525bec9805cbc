"""`tokenizer.json` files, and GPT-2's pair of files, through the Hugging Face `tokenizers` library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from megatron_tokenformer.data.tokenizer_base import END_OF_TEXT, FlatIds, flatten, hash_of, read_model
from megatron_tokenformer.errors import UserError

END_OF_DOCUMENT_NAMES = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>")


class HFTokenizer:
    """The reference for the ids of a `tokenizer.json`.

    `fast_tokenizer.FastTokenizer` gives the same ids many times faster.

    Args:
        model: a `tokenizer.json`, or GPT-2's `vocab.json` if `merges` is given.
        merges: GPT-2's `merges.txt`.
        special_as_text: encode special tokens that are spelled out in a text as any other characters.
    """

    def __init__(self, model: str, merges: str | None = None, special_as_text: bool = False) -> None:
        from tokenizers import Tokenizer as Backend
        from tokenizers import __version__

        self.model = model
        self.merges = merges
        self.special_as_text = special_as_text
        self.options: dict[str, Any] = {"merges": merges} if merges else {}
        self.backend = f"tokenizers {__version__}"
        definition = read_definition(model, merges)
        try:
            self._backend = Backend.from_buffer(definition)
        except Exception as error:  # the library raises bare Exception for a bad file
            kind = "vocab.json with its merges.txt" if merges else "tokenizer.json"
            raise UserError(f"{model!r} is not a {kind}: {error}") from error
        # A file saved with truncation or padding would silently cut or fill every document.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = special_as_text
        added = self._backend.get_added_tokens_decoder()
        self.added_tokens = tuple(token.content for token in added.values())
        self.eod_id = self._find_end_of_document([i for i, token in added.items() if token.special])
        self.vocab_size = self._one_more_than_the_largest_id()
        files = [definition] if merges is None else [read_model(model), read_model(merges)]
        self.fingerprint = hash_of(*files)

    def _find_end_of_document(self, special_ids: list[int]) -> int:
        ids = map(self._backend.token_to_id, END_OF_DOCUMENT_NAMES)
        found = [i for i in ids if i is not None]
        if not found and len(special_ids) == 1:
            found = special_ids
        if not found:
            names = ", ".join(END_OF_DOCUMENT_NAMES)
            raise UserError(f"{self.model!r} has no end-of-document token ({names})")
        name = self._backend.id_to_token(found[0])
        if self.special_as_text and found[0] in self._backend.encode(name, add_special_tokens=False).ids:
            raise UserError(
                f"{self.model!r} cannot encode {name!r} as text, for it is not marked as special; "
                "mark it, or leave special tokens in texts as they are"
            )
        return found[0]

    def _one_more_than_the_largest_id(self) -> int:
        size = self._backend.get_vocab_size(with_added_tokens=True)
        # As a rule no id is left out.  To see that is quicker than to get a dictionary of all.
        if all(map(self._backend.id_to_token, range(size))):
            return size
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    def __reduce__(self) -> tuple[Any, ...]:
        return HFTokenizer, (self.model, self.merges, self.special_as_text)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, with what the file's own template adds, as in GPT-NeoX and Megatron-LM."""
        return self._backend.encode(text).ids

    def encode_flat(self, texts: Sequence[str]) -> FlatIds:
        """The ids of all texts; TOKENIZERS_PARALLELISM says on how many threads."""
        return flatten([encoding.ids for encoding in self._backend.encode_batch_fast(list(texts))])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens."""
        return self._backend.decode(list(ids), skip_special_tokens=True)


def read_definition(model: str, merges: str | None = None) -> bytes:
    """The content of a `tokenizer.json`: that of `model`, or made of GPT-2's two files.

    Raises:
        UserError: a file cannot be read, or is no vocabulary or list of merges.
    """
    if merges is None:
        return read_model(model)
    try:
        vocabulary = orjson.loads(read_model(model))
        end = vocabulary[END_OF_TEXT]
    except (orjson.JSONDecodeError, TypeError) as error:
        raise UserError(f"{model!r} is not GPT-2's vocab.json: {error}") from error
    except KeyError as error:
        raise UserError(f"{model!r} has no end-of-document token ({END_OF_TEXT})") from error
    try:
        # Not splitlines(): the only line end is this one.
        lines = read_model(merges).decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{merges!r} is not GPT-2's merges.txt: {error}") from error
    rules = [line.rstrip("\r") for line in lines if line.strip() and not line.startswith("#version")]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    definition = {
        "version": "1.0",
        "added_tokens": [{"id": end, "content": END_OF_TEXT, "special": True, **flags}],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": rules},
    }
    return orjson.dumps(definition)
