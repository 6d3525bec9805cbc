"""The tokenizer travels with the model where transformers gives the same ids; else it is said why not."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GenerationConfig

from megatron_tokenformer.checkpoint.portable import write_native
from megatron_tokenformer.commands.convert_checkpoint import main
from megatron_tokenformer.config.schema import Tokenizer
from megatron_tokenformer.data.provenance import TokenizerRecord
from megatron_tokenformer.data.tokenizers import load_tokenizer
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.huggingface.export import write_hf
from megatron_tokenformer.huggingface.read import read_hf
from tests.huggingface.models import portable_model

LINES = [f"line {i}: the quick brown fox number {i * i} jumps, does it not?" for i in range(300)]
TEXT = "  The quick fox:\n\tit's 123 times né — 🙂 "


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer.json, GPT-2's two files, and two models of sentencepiece."""
    folder = tmp_path_factory.mktemp("tokenizers")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(LINES, trainer)
    backend.save(str(folder / "tokenizer.json"))
    backend.model.save(str(folder))
    (folder / "lines.txt").write_text("\n".join(LINES))
    for kind in ("bpe", "unigram"):
        SentencePieceTrainer.train(
            input=str(folder / "lines.txt"),
            model_prefix=str(folder / kind),
            model_type=kind,
            vocab_size=330,
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    return folder


TRAINED = {
    "json": {"type": "HFTokenizer", "model": "tokenizer.json"},
    "gpt2": {"type": "GPT2BPETokenizer", "model": "vocab.json", "merges": "merges.txt"},
    "bpe": {"type": "SentencePieceTokenizer", "model": "bpe.model"},
    "unigram": {"type": "SentencePieceTokenizer", "model": "unigram.model"},
}


def named(kind: str, folder: Path) -> Tokenizer:
    """The tokenizer as a config names it."""
    files = {key: str(folder / value) for key, value in TRAINED[kind].items() if key != "type"}
    return Tokenizer.model_validate({"type": TRAINED[kind]["type"], **files})


@pytest.mark.parametrize("kind", TRAINED)
def test_ids_and_the_end_of_documents_are_those_of_the_data(
    kind: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = named(kind, trained)
    ours = load_tokenizer(**tokenizer.model_dump())
    warnings: list[str] = []
    said_by = logging.getLogger("transformers.tokenization_utils_base")
    monkeypatch.setattr(said_by, "handle", lambda record: warnings.append(record.getMessage()))
    outcome = write_hf(portable_model("l2_norm_gelu", tokenizer, 512), tmp_path / "hf")
    assert warnings == [], "samples are longer than the sequence length, which is nothing to tell"
    end = "</s>" if kind in ("bpe", "unigram") else "<|endoftext|>"
    assert outcome.told == f"tokenizer: {tokenizer.model} as tokenizer.json, {end} = {ours.eod_id}"

    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    for text in (*LINES[:20], TEXT):
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode(text)
        assert theirs.decode(ids) == ours.decode(ids)
    assert (theirs.eos_token, theirs.bos_token) == (end, end)
    assert theirs.eos_token_id == ours.eod_id
    assert (theirs.model_max_length, theirs.padding_side) == (48, "left")
    for file in ("config.json", "generation_config.json"):
        stored = json.loads((tmp_path / "hf" / file).read_text())
        assert stored["eos_token_id"] == stored["bos_token_id"] == ours.eod_id
    assert GenerationConfig.from_pretrained(tmp_path / "hf").pad_token_id == ours.eod_id

    monkeypatch.chdir(tmp_path)
    back = read_hf(Path("hf")).tokenizer
    assert back is not None
    assert back.model == str(tmp_path / "hf/tokenizer.json"), "wherever it will be used"
    assert load_tokenizer(**back.model_dump()).encode(LINES[7]) == ours.encode(LINES[7])


def test_the_cards_example_makes_text(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_hf(portable_model("l2_norm_gelu", named("json", trained), 512), tmp_path / "hf")
    code = re.search(r"```python\n(.*?)```", (tmp_path / "hf/README.md").read_text(), re.DOTALL)
    assert code is not None
    exec(code.group(1).replace("FOLDER", str(tmp_path / "hf")), {})
    assert capsys.readouterr().out.startswith("Once upon a time")


@pytest.mark.parametrize(
    ("tokenizer", "told"),
    [
        (None, "tokenizer: none, the checkpoint names none"),
        (
            Tokenizer(type="HFTokenizer", model="/elsewhere/tokenizer.json"),
            "tokenizer: not exported (HFTokenizer): no tokenizer model at '/elsewhere/tokenizer.json'; "
            "--tokenizer-model FILE tells where it is now",
        ),
        (
            Tokenizer(type="ByteTokenizer"),
            "tokenizer: not exported (ByteTokenizer): transformers has no form of it",
        ),
    ],
)
def test_a_model_goes_without_a_tokenizer(tokenizer: Tokenizer | None, told: str, tmp_path: Path) -> None:
    outcome = write_hf(portable_model("l2_norm_gelu", tokenizer, 512), tmp_path / "hf")
    assert outcome.told == told
    assert not (tmp_path / "hf/tokenizer.json").exists()
    expected = 256 if tokenizer is not None and tokenizer.type == "ByteTokenizer" else None
    assert json.loads((tmp_path / "hf/config.json").read_text())["eos_token_id"] == expected


def test_a_tokenizer_that_gives_other_ids_does_not_travel(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swapped = Backend.from_file(str(trained / "tokenizer.json"))
    swapped.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    monkeypatch.setattr(
        "megatron_tokenformer.huggingface.tokenizer.read_definition", lambda *_: swapped.to_str().encode()
    )
    outcome = write_hf(portable_model("l2_norm_gelu", named("json", trained), 512), tmp_path / "hf")
    assert "in transformers it gives other ids, as for 'The quick" in outcome.told
    assert not (tmp_path / "hf/tokenizer.json").exists()


def made_with(tokenizer: Tokenizer) -> TokenizerRecord:
    """As the description of data tells it."""
    loaded = load_tokenizer(**tokenizer.model_dump())
    told = tokenizer.model_dump()
    return TokenizerRecord(**told, fingerprint=loaded.fingerprint, vocab_size=loaded.vocab_size)


def test_a_file_that_did_not_make_the_data_does_not_travel(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = Tokenizer(type="HFTokenizer", model=str(tmp_path / "tokenizer.json"))
    definition = json.loads((trained / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    portable = replace(portable_model("l2_norm_gelu", tokenizer, 512), made_with=made_with(tokenizer))
    write_native(portable, tmp_path / "native")
    vocabulary = definition["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    formats = ["--from", "native", "--to", "hf", "--no-verify", "--load", str(tmp_path / "native")]
    assert main([*formats, "--save", str(tmp_path / "without")]) == 0
    why = rf"not exported \(HFTokenizer\): it was trained on data made with {tokenizer.model} \(hash \w+\)"
    assert re.search(why, capsys.readouterr().out)
    assert not (tmp_path / "without/tokenizer.json").exists()

    with pytest.raises(
        UserError, match=rf"{tmp_path}/native/step-00000000: it was trained on data made with"
    ):
        main([*formats, "--save", str(tmp_path / "other"), "--tokenizer-model", str(tokenizer.model)])
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    moved = str(tmp_path / "moved.json")
    Path(moved).write_text(json.dumps(definition))
    assert main([*formats, "--save", str(tmp_path / "with"), "--tokenizer-model", moved]) == 0
    assert f"tokenizer: {moved} as tokenizer.json" in capsys.readouterr().out


def test_a_tokenizer_with_more_ids_than_the_model_does_not_travel(trained: Path, tmp_path: Path) -> None:
    outcome = write_hf(portable_model("l2_norm_gelu", named("json", trained), 64), tmp_path / "hf")
    file = trained / "tokenizer.json"
    why = f"{file} has 400 token ids, but model.vocab_size is 64"
    assert outcome.told == f"tokenizer: not exported (HFTokenizer): {why}"
