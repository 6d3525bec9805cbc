"""Train a tokenizer on one's own text, streaming the documents."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from megatron_tokenformer.data.inputs import expand_inputs
from megatron_tokenformer.data.readers import read_texts
from megatron_tokenformer.data.tokenizers import load_tokenizer
from megatron_tokenformer.errors import UserError

TRAINABLE_TYPES = ("HFTokenizer", "SentencePieceTokenizer")
END_OF_TEXT = "<|endoftext|>"
# sentencepiece keeps its sentences in memory; this many lines are enough for any vocabulary.
_MAX_SENTENCES = 5_000_000
_MAX_SENTENCE_BYTES = 16_384


def train_tokenizer(
    inputs: Sequence[str],
    type: str,
    vocab_size: int,
    output: str,
    *,
    json_key: str = "text",
    overwrite: bool = False,
) -> int:
    """Train on all documents of `inputs` and write the model file.

    Args:
        inputs: file names or globs of JSON lines.
        type: `HFTokenizer` (byte-level BPE as GPT-2's, a `tokenizer.json`) or `SentencePieceTokenizer`
            (BPE with bytes as fallback, a `.model`).  Both give a text back unchanged, but for U+2581, which
            sentencepiece takes for a space.
        vocab_size: ids wanted, special tokens included.
        output: the file to write.
        json_key: where a line's text is.
        overwrite: replace an existing output.

    Returns:
        The ids that the tokenizer has: fewer than wanted if the text holds no more.

    Raises:
        UserError: a wrong argument, no text, bad input.
    """
    if type not in TRAINABLE_TYPES:
        raise UserError(f"cannot train a {type!r}; choose one of {', '.join(TRAINABLE_TYPES)}")
    if os.path.exists(output) and not overwrite:
        raise UserError(f"{output} already exists; use --overwrite to replace it")
    least = 257 if type == "HFTokenizer" else 260
    if vocab_size < least:
        raise UserError(
            f"vocab_size {vocab_size} is too small: 256 bytes and the special tokens need {least}"
        )
    texts = _texts(expand_inputs(inputs), json_key)
    train = _train_byte_level if type == "HFTokenizer" else _train_sentencepiece
    model = train(texts, vocab_size)
    try:
        os.makedirs(os.path.dirname(output) or ".", exist_ok=True)
        with open(f"{output}.tmp", "wb") as file:
            file.write(model)
        os.replace(f"{output}.tmp", output)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}", exit_code=1) from error
    return load_tokenizer(type, output).vocab_size


def _texts(paths: list[str], json_key: str) -> Iterator[str]:
    """All texts, with a progress bar over the bytes of the inputs."""
    total, texts = sum(os.path.getsize(path) for path in paths), 0
    with tqdm(total=total, unit="B", unit_scale=True, desc="read") as bar:
        for text in read_texts(paths, json_key, bar.update):
            texts += bool(text)
            yield text
    if texts == 0:
        raise UserError(f"no text in {len(paths)} input file(s), e.g. {paths[0]}", exit_code=1)


def _train_byte_level(texts: Iterator[str], vocab_size: int) -> bytes:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str(pretty=True).encode("utf-8")


def _train_sentencepiece(texts: Iterator[str], vocab_size: int) -> bytes:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    # Lines, for sentencepiece drops long sentences; no normalisation, for code needs every space.
    lines = (line for text in texts for line in text.split("\n") if line)
    try:
        SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=_MAX_SENTENCE_BYTES,
            input_sentence_size=_MAX_SENTENCES,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(f"sentencepiece cannot train {vocab_size} pieces: {error}", exit_code=1) from error
    return model.getvalue()
