"""The fast backend gives the ids of Hugging Face's tokenizers, or is not used and the reason is told."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tokenformer.data import fast_tokenizer
from megatron_tokenformer.data.encode import Job
from megatron_tokenformer.data.fast_tokenizer import HARD_TEXTS, FastTokenizer, choose_backend, difference
from megatron_tokenformer.data.preprocess import Options, preprocess
from megatron_tokenformer.data.readers import read_chunks, sample_texts
from megatron_tokenformer.data.tokenizer_training import train_tokenizer
from megatron_tokenformer.data.tokenizers import ByteTokenizer, FlatIds, HFTokenizer, load_tokenizer
from megatron_tokenformer.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
# First and last code points of ranges that a tokenizer may treat in ways of its own.
RANGES = {
    "ascii": (0x20, 0x7E),
    "control": (0x00, 0x1F),
    "latin": (0xC0, 0x24F),
    "combining": (0x300, 0x36F),
    "cyrillic": (0x400, 0x4FF),
    "hebrew and arabic": (0x590, 0x6FF),
    "indic": (0x900, 0xDFF),
    "thai": (0xE00, 0xE7F),
    "spaces and joiners": (0x2000, 0x206F),
    "symbols": (0x2190, 0x2BFF),
    "han and kana": (0x3040, 0x9FFF),
    "hangul": (0xAC00, 0xD7A3),
    "private": (0xE000, 0xF8FF),
    "variation": (0xFE00, 0xFE0F),
    "emoji": (0x1F300, 0x1FAFF),
    "beyond": (0x20000, 0x10FFFF),
}
WORDS = [
    " ",
    "\n",
    "\r\n",
    "\t",
    "  ",
    "<|endoftext|>",
    "<|endof",
    "'s",
    "'re",
    " the",
    "def f(x):",
    "123",
    "\u200d",
]


def fuzzed_text(generator: random.Random) -> str:
    """Pieces of words, of one script each, and now and then a long run of one character."""
    pieces = []
    for _ in range(generator.randrange(1, 30)):
        low, high = generator.choice(list(RANGES.values()))
        kind = generator.random()
        if kind < 0.4:
            pieces.append(generator.choice(WORDS))
        elif kind < 0.97:
            pieces.append(
                "".join(chr(generator.randint(low, high)) for _ in range(generator.randrange(1, 12)))
            )
        else:
            pieces.append(chr(generator.randint(low, high)) * generator.randrange(100, 3_000))
    return "".join(pieces)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = random.Random(7)
    texts = [
        path.read_text(encoding="utf-8") for path in sorted(Path(fast_tokenizer.__file__).parent.glob("*.py"))
    ]
    texts += [fuzzed_text(generator) for _ in range(300)]
    path = tmp_path_factory.mktemp("corpus") / "a.jsonl"
    path.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def reference(corpus: Path) -> HFTokenizer:
    model = str(corpus.parent / "tokenizer.json")
    train_tokenizer([str(corpus)], "HFTokenizer", 3_000, model)
    return HFTokenizer(model)


@pytest.fixture(scope="module")
def fast(reference: HFTokenizer) -> FastTokenizer:
    return FastTokenizer(reference)


@settings(max_examples=150, deadline=None)
@given(
    texts=st.lists(
        st.lists(st.one_of(st.text(st.characters(codec="utf-8")), st.sampled_from(WORDS))).map("".join)
    )
)
def test_identical_ids_for_any_text(reference: HFTokenizer, fast: FastTokenizer, texts: list[str]) -> None:
    assert difference(reference, fast, texts) is None
    assert [fast.encode(text) for text in texts] == [reference.encode(text) for text in texts]


@pytest.mark.parametrize("seed", range(4))
def test_identical_ids_for_a_fuzzed_corpus(reference: HFTokenizer, fast: FastTokenizer, seed: int) -> None:
    generator = random.Random(seed)
    texts = [fuzzed_text(generator) for _ in range(500)]
    assert difference(reference, fast, [*texts, *HARD_TEXTS]) is None
    for text in texts[:50]:
        assert fast.decode(fast.encode(text)) == reference.decode(reference.encode(text))


@pytest.mark.parametrize("unit", ["a", " ", "\n", "\u0301", "\U0001f600", "<|endoftext|>", "日", "a\u0301 "])
def test_identical_ids_for_very_long_runs(reference: HFTokenizer, fast: FastTokenizer, unit: str) -> None:
    assert difference(reference, fast, [unit * 100_000, f"x{unit * 30_000} y"]) is None


def test_a_template_with_a_beginning_of_text_is_applied(reference: HFTokenizer, tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers.processors import TemplateProcessing

    backend = Backend.from_file(reference.model)
    backend.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", reference.eod_id)]
    )
    backend.save(str(tmp_path / "t.json"))
    templated = HFTokenizer(str(tmp_path / "t.json"))
    chosen = choose_backend(templated, "auto", ["abc"])
    assert chosen.encode("abc") == templated.encode("abc") == [reference.eod_id, *reference.encode("abc")]


def test_the_fast_backend_is_chosen_when_it_agrees(
    reference: HFTokenizer, capfd: pytest.CaptureFixture
) -> None:
    for wanted in ("auto", "fastokens"):
        chosen = choose_backend(reference, wanted, ["abc"])
        assert isinstance(chosen, FastTokenizer)
        assert (chosen.eod_id, chosen.vocab_size) == (reference.eod_id, reference.vocab_size)
        assert isinstance(pickle.loads(pickle.dumps(chosen)), FastTokenizer)
    assert choose_backend(reference, "huggingface", ["abc"]) is reference
    assert capfd.readouterr().err == ""


def test_other_ids_are_noticed_and_named(
    reference: HFTokenizer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    honest = FastTokenizer.encode_unaided

    def wrong(self: FastTokenizer, texts: list[str]) -> FlatIds:
        ids, lengths = honest(self, texts)
        return FlatIds(ids + np.int32(any("qx" in text for text in texts)), lengths)

    monkeypatch.setattr(FastTokenizer, "encode_unaided", wrong)
    assert isinstance(choose_backend(reference, "auto", ["fine"]), FastTokenizer)
    assert choose_backend(reference, "auto", ["fine", "not qx"]) is reference
    assert capfd.readouterr().err.splitlines() == [
        "note: huggingface, which is slower, instead of fastokens: other ids for 'not qx'"
    ]
    with pytest.raises(UserError, match="fastokens cannot be used: other ids for 'not qx'"):
        choose_backend(reference, "fastokens", ["not qx"])


def test_a_file_that_fastokens_does_not_take_goes_to_tokenizers(
    tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture
) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, trainers

    backend = Backend(models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=["<unk>", "</s>"], show_progress=False)
    backend.train_from_iterator(["some words to learn"], trainer)
    backend.save(str(tmp_path / "t.json"))
    job = Job("HFTokenizer", str(tmp_path / "t.json"))
    summary = preprocess([str(corpus)], str(tmp_path / "out"), job).datasets[0]
    assert summary["tokenizer"]["backend"].startswith("tokenizers ")
    assert "instead of fastokens: " in capfd.readouterr().err.splitlines()[0]


def test_a_batch_refused_in_mid_run_goes_to_tokenizers(
    reference: HFTokenizer, fast: FastTokenizer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    def refuse(self: FastTokenizer, texts: list[str]) -> FlatIds:
        raise ValueError("match limit\nreached")

    monkeypatch.setattr(FastTokenizer, "encode_unaided", refuse)
    copy = pickle.loads(pickle.dumps(fast))
    for _ in range(2):
        assert all(map(np.array_equal, copy.encode_flat(["ab", "c"]), reference.encode_flat(["ab", "c"])))
    assert capfd.readouterr().err.splitlines() == [
        "note: a batch goes to huggingface: ValueError: match limit reached"
    ]


def test_a_backend_of_other_tokenizers_is_refused(reference: HFTokenizer) -> None:
    assert isinstance(choose_backend(ByteTokenizer(), "auto", []), ByteTokenizer)
    with pytest.raises(UserError, match="fastokens is not for a ByteTokenizer; choose auto"):
        choose_backend(ByteTokenizer(), "fastokens", [])
    with pytest.raises(UserError, match="not for a HFTokenizer; choose auto, fastokens or huggingface"):
        choose_backend(reference, "tiktoken", [])
    with pytest.raises(UserError, match="choose one of auto, fastokens, huggingface, tiktoken"):
        choose_backend(load_tokenizer("ByteTokenizer"), "slow", [])


def test_the_sample_takes_whole_documents_and_no_bad_ones(corpus: Path, tmp_path: Path) -> None:
    texts = [orjson.loads(line)["text"] for line in corpus.read_bytes().splitlines()]
    sample = sample_texts([str(corpus)], size=100_000)
    assert sample == texts[: len(sample)]
    assert 10 < len(sample) < len(texts)
    (tmp_path / "bad.jsonl").write_bytes(b'{broken\n{"text": 1}\n{"text": "good"}\n\xff')
    (tmp_path / "long.jsonl").write_bytes(b'{"text": "' + b"x" * 1_000_000)
    (tmp_path / "cut.jsonl.gz").write_bytes(b"\x1f\x8b")
    paths = [str(tmp_path / name) for name in ("bad.jsonl", "long.jsonl", "cut.jsonl.gz")]
    assert sample_texts(paths, size=3_000) == ["good", '{"text": "' + "x" * 990, ""]
    assert len(sample_texts([str(corpus)] * 20, size=80_000)) < len(sample) * 2


def test_the_output_is_the_same_for_both_backends_and_the_choice_is_recorded(
    corpus: Path, reference: HFTokenizer, tmp_path: Path
) -> None:
    outputs = {}
    for name, workers in (("huggingface", 1), ("fastokens", 1), ("auto", 2), ("auto in processes", 5)):
        backend = name.split()[0]
        job = Job("HFTokenizer", reference.model, append_eod=True, tokenizer_backend=backend)
        summary = preprocess([str(corpus)], str(tmp_path / name), job, Options(workers=workers)).datasets[0]
        outputs[name] = [Path(f"{summary['prefix']}{suffix}").read_bytes() for suffix in (".bin", ".idx")]
        recorded = json.loads(Path(f"{summary['prefix']}.json").read_text())["tokenizer"]["backend"]
        assert recorded.split()[0] == ("tokenizers" if backend == "huggingface" else "fastokens")
    assert all(output == outputs["huggingface"] for output in outputs.values())


def test_chunks_do_not_change_ids(corpus: Path, reference: HFTokenizer, fast: FastTokenizer) -> None:
    texts = [
        [orjson.loads(line)["text"] for line in chunk.data.splitlines()]
        for chunk in read_chunks(str(corpus), chunk_bytes=50_000)
    ]
    assert len(texts) > 3
    ids = np.concatenate([fast.encode_flat(part).ids for part in texts])
    assert np.array_equal(ids, reference.encode_flat([text for part in texts for text in part]).ids)


@pytest.mark.parametrize("workers", [None, 1, 3])
def test_the_tool_never_imports_torch_or_transformers(
    workers: int | None, corpus: Path, reference: HFTokenizer, tmp_path: Path
) -> None:
    """Modules of these names that refuse to be imported stand first on the path, for the workers too."""
    for name in ("torch", "transformers"):
        (tmp_path / f"{name}.py").write_text("raise AssertionError('imported')\n")
    arguments = ["--help"]
    if workers:
        arguments = [
            "--input",
            str(corpus),
            "--output-prefix",
            str(tmp_path / "out"),
            "--workers",
            str(workers),
        ]
        arguments += ["--tokenizer-type", "HFTokenizer", "--tokenizer-model", reference.model]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/preprocess_data.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )
    assert done.returncode == 0, done.stderr
    assert "imported" not in done.stderr
