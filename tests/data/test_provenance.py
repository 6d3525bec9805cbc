"""Data, config and checkpoint must agree about the tokenizer, as far as they tell one."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tokenformer.data.provenance import (
    TokenizerRecord,
    check_configured,
    check_continued,
    one_tokenizer,
)
from megatron_tokenformer.data.tokenizer_training import train_tokenizer
from megatron_tokenformer.data.tokenizers import ByteTokenizer
from megatron_tokenformer.errors import UserError
from tests.data.runs import json_lines

ONE = TokenizerRecord("HFTokenizer", "1" * 64, 100, "one.json", 0)
SAME = TokenizerRecord("HFTokenizer", "1" * 64, 100, "elsewhere/one.json", 0)
OTHER = TokenizerRecord("SentencePieceTokenizer", "2" * 64, 100, "two.model", 0)


def test_sources_of_one_tokenizer_agree_whatever_its_file_was_called() -> None:
    assert one_tokenizer([("a", ONE), ("b", SAME)]) == ONE
    assert one_tokenizer([("a", None), ("b", SAME), ("c", None)]) == SAME
    assert one_tokenizer([("a", None)]) is None
    assert one_tokenizer([]) is None


def test_sources_that_differ_are_refused_with_prefixes_names_and_hashes() -> None:
    with pytest.raises(UserError) as refused:
        one_tokenizer([("a", ONE), ("b", None), ("c", OTHER)])
    assert refused.value.exit_code == 2
    assert "a was made with one.json (hash 111111111111), c with two.model (hash 222222222222)" in str(
        refused.value
    )


def test_the_configs_model_file_must_be_the_one_that_made_the_data(tmp_path: Path) -> None:
    model = tmp_path / "tokenizer.json"
    (tmp_path / "a.jsonl").write_bytes(json_lines(["some text"]))
    train_tokenizer([str(tmp_path / "a.jsonl")], "HFTokenizer", 260, str(model))
    true = hashlib.sha256(model.read_bytes()).hexdigest()
    check_configured(TokenizerRecord("HFTokenizer", true, 100), "HFTokenizer", str(model))
    with pytest.raises(
        UserError, match=rf"tokenizer\.json \(hash {true[:12]}\), but .* one\.json \(hash 1111"
    ):
        check_configured(ONE, "HFTokenizer", str(model))
    check_configured(ONE, "HFTokenizer", str(tmp_path / "not here"))
    check_configured(ONE, "GPT2BPETokenizer", str(model), merges=str(tmp_path / "not here"))
    check_configured(ONE, "HFTokenizer", None)


def test_the_byte_tokenizer_has_no_file_and_is_held_against_the_data_all_the_same() -> None:
    made_with = TokenizerRecord("ByteTokenizer", ByteTokenizer.fingerprint, 257)
    check_configured(made_with, "ByteTokenizer", None)
    with pytest.raises(UserError, match="is ByteTokenizer"):
        check_configured(ONE, "ByteTokenizer", None)


def test_a_checkpoint_goes_on_with_its_own_tokenizer_or_an_unknown_one() -> None:
    for before, now in ((ONE, SAME), (None, ONE), (ONE, None), (None, None)):
        check_continued("step-1", before, now)
    with pytest.raises(UserError, match=r"step-1 .* one\.json \(hash 1{12}\), .* two\.model \(hash 2{12}\)"):
        check_continued("step-1", ONE, OTHER)


def test_none_of_this_imports_a_tokenizer_library_or_torch() -> None:
    code = (
        "import sys, megatron_tokenformer.data.provenance\n"
        "print({'torch', 'tokenizers', 'fastokens', 'sentencepiece'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "set()\n"
