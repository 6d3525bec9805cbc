"""The command that lets a checkpoint write, on the bytes of a small text, whatever layout wrote it."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tokenformer.checkpoint.manifest import read_manifest
from megatron_tokenformer.checkpoint.store import find_checkpoint
from megatron_tokenformer.commands.generate_text import main
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.data.tokenizers import load_tokenizer
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.evaluation import load
from megatron_tokenformer.evaluation.load import checkpoint_tokenizer, load_model, open_checkpoint
from tests.descriptions import describe
from tests.evaluation.models import byte_level_bpe, plain_logits, train_on_text, write_json_lines
from tests.ranks import run_ranks
from tests.toy import DENSE, toy_config, train_toy, write_tokens

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=["tokenformer", "dense"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    model = DENSE if request.param == "dense" else {}
    text = "the cat sat on the mat. \u00e9\u20ac\U0001f600 " * 60
    return train_on_text(tmp_path_factory.mktemp("trained"), text, tensor=2, pipeline=2, model=model)


def plain_text(config: RunConfig, prompt: str, count: int) -> str:
    """What the likeliest bytes come to, without any of the code for it."""
    path = find_checkpoint(config.run_dir)
    model, ids = load_model(path, read_manifest(path), "fp32", torch.device("cpu")), list(prompt.encode())
    for _ in range(count):
        token = int(plain_logits(model, ids)[-1, :257].argmax())
        if token == 256:
            break
        ids.append(token)
    return bytes(ids[len(prompt.encode()) :]).decode(errors="replace")


def write(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, dict[str, Any]]:
    """Run the command; what it printed before the last line, and that."""
    assert main([*words, "--json"]) == 0
    *text, last = capsys.readouterr().out.split("\n")[:-1]
    return "\n".join(text), json.loads(last)


def test_a_prompt_is_gone_on_from(trained: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--load", trained.run_dir, "--prompt", "the cat", "--max-tokens", "12"]
    shown, told = write(capsys, *words)
    expected = plain_text(trained, "the cat", 12)
    assert shown == "the cat" + expected
    (row,) = told["texts"]
    assert (row["prompt"], row["text"], row["tokens"]) == ("the cat", expected, 12)
    assert (told["step"], row["finish"], row["sample"]) == (4, "length", 0)


def test_each_line_of_standard_input_is_a_prompt(
    trained: RunConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("the\na cat"))
    _, told = write(capsys, "--load", trained.run_dir, "--max-tokens", "5")
    assert [(row["prompt"], row["text"]) for row in told["texts"]] == [
        (prompt, plain_text(trained, prompt, 5)) for prompt in ("the", "a cat")
    ]


def test_a_file_of_prompts_gives_json_lines_in_order_whatever_the_batch(
    trained: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["the cat sat", "a", "", "on the mat, the cat", "\u00e9"]
    lines = write_json_lines(
        tmp_path / "in.jsonl", [{"prompt": text, "id": n} for n, text in enumerate(prompts)]
    )
    found = {}
    for size in (1, 2, 16):
        output = tmp_path / f"out-{size}.jsonl"
        words = ["--prompt-file", str(lines), "--output", str(output), "--batch-size", str(size)]
        sampled = ["--num-samples", "2", "--temperature", "0.9", "--max-tokens", "6"]
        _, told = write(capsys, "--load", trained.run_dir, *words, *sampled)
        assert (told["prompts"], told["texts"]) == (5, 10)
        found[size] = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
        assert told["tokens"] == sum(row["tokens"] for row in found[size])
    assert found[1] == found[2] == found[16]
    assert [(row["id"], row["sample"], row["prompt"]) for row in found[1]] == [
        (n, sample, text) for n, text in enumerate(prompts) for sample in (0, 1)
    ]
    assert any(one["text"] != two["text"] for one, two in zip(found[1][::2], found[1][1::2]))


def test_a_plain_file_has_a_prompt_in_each_line(
    trained: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.txt").write_text('the cat\n{"prompt": 1}\n')
    shown, told = write(
        capsys, "--load", trained.run_dir, "--prompt-file", str(tmp_path / "in.txt"), "--max-tokens", "4"
    )
    rows = [json.loads(line) for line in shown.splitlines()]
    assert [(row["prompt"], row["text"]) for row in rows] == [
        (prompt, plain_text(trained, prompt, 4)) for prompt in ("the cat", '{"prompt": 1}')
    ]
    assert told["tokens_per_s"] > 0


def test_texts_longer_than_the_model_was_trained_on_are_warned_of_once(
    trained: RunConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("the\na cat\n"))
    assert main(["--load", trained.run_dir, "--max-tokens", "40"]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert "3 tokens of a prompt and up to 40 after it are more than the 32" in warnings[0]
    assert main(["--load", trained.run_dir, "--prompt", "the", "--max-tokens", "29"]) == 0
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, code, told",
    [
        (["--load", "nowhere"], 2, "no complete checkpoint at nowhere"),
        (["--max-tokens", "0"], 2, "--max-tokens 0 must be at least 1"),
        (["--temperature", "0", "--top-k", "3"], 2, "--temperature 0 takes the likeliest token"),
        (["--stop", ""], 2, "--stop '' would end every text at once"),
        (["--output", "x.jsonl"], 2, "--output is for --prompt-file"),
        (["--seed", "-1"], 2, "--seed -1 must be at least 0"),
        (["--top-p", "1.5"], 2, "--top-p 1.5 must be above 0, at most 1"),
        (["--tokenizer-model", "gone.json"], None, ""),  # of bytes, which have no file
    ],
)
def test_what_cannot_be_meant_is_refused_in_words(
    trained: RunConfig, words: list[str], code: int | None, told: str
) -> None:
    given = ["--load", trained.run_dir, "--prompt", "a", "--max-tokens", "1", *words]
    if code is None:
        assert main(given) == 0
        return
    with pytest.raises(UserError, match=re.escape(told)) as error:
        main(given)
    assert error.value.exit_code == code


@pytest.mark.parametrize(
    "line, told",
    [
        ("{}", 'no object with a text in "prompt"'),
        ("[1", "Expecting"),
        ("", "holds no prompt"),
        ('{"prompt": "a", "text": "b"}', '"text" is what is written here'),
        ('{"prompt": "a \\ud800"}', r"is not UTF-8 text: character 3 is half a character, \\ud800"),
    ],
)
def test_a_bad_line_is_named(trained: RunConfig, tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a"}\n' + line + "\n" if line else "")
    with pytest.raises(UserError, match=told) as error:
        main(["--load", trained.run_dir, "--prompt-file", str(path)])
    assert not line or "bad.jsonl, line 2" in str(error.value)


@pytest.mark.parametrize("trained", ["tokenformer"], indirect=True)
@pytest.mark.parametrize("locale", ["C.UTF-8", "strict"])
def test_bytes_that_are_no_text_are_told_where_they_are(
    trained: RunConfig, tmp_path: Path, locale: str
) -> None:
    (tmp_path / "in.txt").write_bytes(b"the\ncat \xff\n")
    strict = {"PYTHONIOENCODING": "utf-8:strict"} if locale == "strict" else {"LC_ALL": locale}
    tool = [sys.executable, "tools/generate_text.py", "--load", trained.run_dir, "--max-tokens", "4"]

    def told(*words: str | bytes, stdin: bytes = b"") -> tuple[int, str, str]:
        ended = subprocess.run(
            [*tool, *words], cwd=ROOT, env=os.environ | strict, input=stdin, capture_output=True
        )
        return ended.returncode, ended.stdout.decode(), ended.stderr.decode().splitlines()[-1]

    code, out, error = told(stdin=b"the\ncat \xff\n")
    assert (code, out) == (1, "the" + plain_text(trained, "the", 4) + "\n"), "what came before is answered"
    assert error.startswith("error: standard input, line 2 is not UTF-8 text: character 5 is byte 0xff")
    code, _, error = told("--prompt-file", str(tmp_path / "in.txt"))
    assert code == 1 and error.startswith(f"error: {tmp_path}/in.txt, line 2 is not UTF-8 text")
    code, _, error = told("--prompt", b"\xff\xfe ab")
    assert code == 1 and error.startswith("error: --prompt is not UTF-8 text: character 1 is byte 0xff")


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_weights_of_no_use_write_nothing(
    trained: RunConfig, temperature: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = load.load_model

    def load_nan(*given: Any) -> Any:
        model = real(*given)
        model.embedding.weight.fill_(float("nan"))
        return model

    monkeypatch.setattr(load, "load_model", load_nan)
    with pytest.raises(UserError, match="logits are NaN or infinite: the checkpoint's weights are broken"):
        main(["--load", trained.run_dir, "--prompt", "a", "--temperature", temperature])


@pytest.mark.parametrize(
    "output, told",
    [("gone/x", "there is no folder"), ("/proc/x", "nothing can be written"), (".", "is a folder")],
)
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_read(
    tmp_path: Path, output: str, told: str
) -> None:
    words = ["--prompt-file", str(tmp_path / "none"), "--output", str(tmp_path / output)]
    with pytest.raises(UserError, match=told):
        main(["--load", "nowhere", *words])


def test_an_output_that_is_there_stays(trained: RunConfig, tmp_path: Path) -> None:
    for name in ("in.txt", "out.jsonl"):
        (tmp_path / name).write_text("kept\n")
    words = ["--prompt-file", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out.jsonl")]
    with pytest.raises(UserError, match="already exists"):
        main(["--load", trained.run_dir, *words])
    assert (tmp_path / "out.jsonl").read_text() == "kept\n"


def test_the_tokenizer_is_the_one_of_the_data(tmp_path: Path) -> None:
    file = byte_level_bpe(tmp_path)
    real = load_tokenizer("HFTokenizer", file)
    moved = str(Path(file).rename(tmp_path / "moved.json"))
    told = {"type": "HFTokenizer", "model": file, "vocab_size": real.vocab_size, "eod_id": 0}
    prefix = describe(write_tokens(tmp_path), fingerprint=real.fingerprint, tokenizer=told)
    config = toy_config(tmp_path, training={"steps": 2}, model={"vocab_size": 300}, data={"train": prefix})
    run_ranks(1, train_toy, config)
    stored = open_checkpoint(config.run_dir)
    with pytest.raises(UserError, match=r"no tokenizer model at .*small\.json.*--tokenizer-model"):
        checkpoint_tokenizer(stored)
    assert checkpoint_tokenizer(stored, moved).fingerprint == real.fingerprint
    other = Path(moved).read_text().replace("endoftext", "eos")
    (tmp_path / "other.json").write_text(other)
    with pytest.raises(UserError, match=r"was trained on data made with .*small\.json .*not with .*other"):
        checkpoint_tokenizer(stored, str(tmp_path / "other.json"))


def test_a_checkpoint_that_tells_no_tokenizer_is_refused(tmp_path: Path) -> None:
    config = toy_config(tmp_path, training={"steps": 2})
    run_ranks(1, train_toy, config)
    with pytest.raises(UserError, match=r"nothing tells the tokenizer: .*data\.tokenizer\.type"):
        main(["--load", config.run_dir, "--prompt", "a"])


@pytest.mark.parametrize("trained", ["tokenformer"], indirect=True)
def test_text_appears_as_it_comes_and_the_tool_ends_in_words(trained: RunConfig) -> None:
    tool = [sys.executable, "tools/generate_text.py", "--load", trained.run_dir, "--max-tokens", "6"]
    process = subprocess.Popen(
        tool, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
    )
    assert process.stdin and process.stdout
    # It answers a line before the next one is there, as one who types needs it.
    for prompt in ("the", "cat"):
        process.stdin.write(prompt + "\n")
        process.stdin.flush()
        answer = prompt + plain_text(trained, prompt, 6)
        assert process.stdout.read(len(answer) + 1) == answer + "\n"
    process.stdin.close()
    assert process.wait() == 0
    bad = subprocess.run([*tool, "--prompt", "a", "--seed", "-1"], cwd=ROOT, capture_output=True, text=True)
    assert (bad.returncode, bad.stderr) == (2, "error: --seed -1 must be at least 0\n")
