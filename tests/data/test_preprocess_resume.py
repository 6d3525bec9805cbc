"""A run that was stopped goes on after the last finished input file, and its output is as if it never was."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest

from megatron_tokenformer.data import outputs
from megatron_tokenformer.data.encode import Job
from megatron_tokenformer.data.indexed import TokenFileWriter
from megatron_tokenformer.data.journal import Journal
from megatron_tokenformer.data.preprocess import Options, preprocess
from megatron_tokenformer.errors import UserError
from tests.data.runs import BYTES, ROOT, json_lines, names, output_bytes

FILES = 8


@pytest.fixture(autouse=True)
def always_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Journal, "is_due", lambda self: True)


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    (tmp_path / "in").mkdir()
    paths = [tmp_path / "in" / f"{number}.jsonl" for number in range(FILES)]
    for number, path in enumerate(paths):
        texts = [f"file {number} document {i}" for i in range(50)]
        path.write_bytes(json_lines(texts, meta={"set": f"Set {number % 3}"}))
    return [str(path) for path in paths]


def break_file(path: str) -> bytes:
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[:200] + b"\n" + content[200:])
    return content


@pytest.mark.parametrize("split_by", [None, "meta.set"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_failed_run_goes_on_where_the_mended_input_begins(
    tmp_path: Path, inputs: list[str], workers: int, split_by: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    job = BYTES._replace(split_by=split_by)
    whole = preprocess(inputs, str(tmp_path / "whole/x"), job).datasets
    content = break_file(inputs[5])
    with pytest.raises(UserError, match=r"5\.jsonl:4: malformed"):
        preprocess(inputs, str(tmp_path / "out/x"), job, Options(workers=workers))
    assert "note: 5 input files are done" in capsys.readouterr().err
    assert not [name for name in names(tmp_path / "out") if name.endswith((".bin", ".idx", ".json"))]

    Path(inputs[5]).write_bytes(content)
    result = preprocess(inputs, str(tmp_path / "out/x"), job, Options(workers=workers))
    assert result.resumed == 5
    assert names(tmp_path / "out") == names(tmp_path / "whole")
    for path in (tmp_path / "whole").iterdir():
        if path.suffix != ".json":
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    counts = ("documents", "tokens", "text_bytes", "inputs")
    assert [[one[key] for key in counts[:3]] for one in result.datasets] == [
        [one[key] for key in counts[:3]] for one in whole
    ]
    assert [one["path"] for one in result.datasets[0]["inputs"]] == inputs


def test_runs_killed_at_any_moment_end_with_the_bytes_of_one_that_was_not(tmp_path: Path) -> None:
    generator = random.Random(0)
    (tmp_path / "in").mkdir()
    for number in range(30):
        texts = [f"{number} {i} {generator.random()}" * 20 for i in range(200)]
        (tmp_path / "in" / f"{number:02}.jsonl").write_bytes(json_lines(texts))
    inputs = str(tmp_path / "in/*.jsonl")
    preprocess([inputs], str(tmp_path / "whole"), BYTES)
    code = (
        "import sys; from megatron_tokenformer.data.journal import Journal;"
        "from megatron_tokenformer.data.preprocess import preprocess; from tests.data.runs import BYTES;"
        "Journal.is_due = lambda self: print('finished', flush=True) or True;"
        "print('resumed', preprocess(sys.argv[1:2], sys.argv[2], BYTES).resumed)"
    )
    command = [sys.executable, "-c", code, inputs, str(tmp_path / "out")]
    kills = 0
    while True:
        process = subprocess.Popen(
            command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        # It tells each input that it has finished, and is killed after some of them, wherever it then is.
        told = [process.stdout.readline() for _ in range(1 + generator.randrange(6))]
        if kills < 8:
            process.send_signal(signal.SIGKILL)
        told += process.stdout.readlines()
        process.wait()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        kills += 1
    assert kills > 3
    assert int(told[-1].removeprefix("resumed ")) > 0
    assert output_bytes(tmp_path / "out") == output_bytes(tmp_path / "whole")
    left = [f"{run}_text_document.{end}" for run in ("out", "whole") for end in ("bin", "idx", "json")]
    assert names(tmp_path) == ["in", *left]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("settings", r"other settings \(append_eod\)"),
        ("component", r"other settings \(split_by\)"),
        ("input", "has read other input files, or they have changed"),
    ],
)
def test_another_run_is_refused_with_the_reason_until_told_to_begin_anew(
    tmp_path: Path, inputs: list[str], change: str, reason: str
) -> None:
    content = break_file(inputs[5])
    first = BYTES._replace(split_by="meta.set") if change == "component" else BYTES
    with pytest.raises(UserError):
        preprocess(inputs, str(tmp_path / "out"), first)
    Path(inputs[5]).write_bytes(content)
    job = Job("ByteTokenizer", None) if change == "settings" else BYTES
    if change == "input":
        os.utime(inputs[2], (0, 0))
    before = names(tmp_path)
    with pytest.raises(UserError, match=reason) as caught:
        preprocess(inputs, str(tmp_path / "out"), job)
    assert caught.value.exit_code == 2
    assert names(tmp_path) == before
    assert preprocess(inputs, str(tmp_path / "out"), job, Options(restart=True)).resumed == 0
    preprocess(inputs, str(tmp_path / "whole"), job)
    assert output_bytes(tmp_path / "out") == output_bytes(tmp_path / "whole")
    assert not [name for name in names(tmp_path) if name.endswith((".tmp", ".journal"))]


def test_an_interrupt_while_a_file_is_noted_loses_nothing(
    tmp_path: Path, inputs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = []

    def interrupted(value: object) -> object:
        copies.append(value)
        if len(copies) == 4:
            raise KeyboardInterrupt
        return deepcopy(value)

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "deepcopy", interrupted)
        with pytest.raises(KeyboardInterrupt):
            preprocess(inputs, str(tmp_path / "out"), BYTES)
    assert preprocess(inputs, str(tmp_path / "out"), BYTES).resumed > 0
    preprocess(inputs, str(tmp_path / "whole"), BYTES)
    assert output_bytes(tmp_path / "out") == output_bytes(tmp_path / "whole")


def test_each_problem_is_counted_once_however_often_a_run_stops(tmp_path: Path, inputs: list[str]) -> None:
    break_file(inputs[1])
    bad = break_file(inputs[2])
    for _ in range(3):
        Path(inputs[2]).write_bytes(bad[:100] + b"\n" + bad[100:] + json_lines(["x"], meta={"set": "//"}))
        with pytest.raises(UserError, match="no letter"):
            job = BYTES._replace(split_by="meta.set")
            preprocess(inputs, str(tmp_path / "out"), job, Options(on_error="skip"))
    Path(inputs[2]).write_bytes(bad)
    result = preprocess(inputs, str(tmp_path / "out"), job, Options(on_error="skip"))
    assert result.resumed == 2
    assert result.datasets[0]["problems"]["malformed JSON"]["count"] == 2


def test_what_was_skipped_before_is_still_counted_and_is_not_taken_for_good(
    tmp_path: Path, inputs: list[str]
) -> None:
    break_file(inputs[1])
    break_file(inputs[5])
    job, skip = BYTES._replace(split_by="meta.set"), Options(on_error="skip")
    Path(inputs[6]).write_bytes(json_lines(["a"], meta={"set": "//"}))
    for name in ("out", "again"):
        with pytest.raises(UserError, match="no letter"):
            preprocess(inputs, str(tmp_path / name), job, skip)
    Path(inputs[6]).write_bytes(json_lines(["fine"], meta={"set": "Set 0"}))
    result = preprocess(inputs, str(tmp_path / "out"), job, skip)
    assert result.resumed == 6
    assert result.datasets[0]["problems"]["malformed JSON"]["count"] == 4
    with pytest.raises(UserError, match="has skipped bad input, which is now to fail"):
        preprocess(inputs, str(tmp_path / "again"), job)
    with pytest.raises(UserError, match=r"1\.jsonl:4: malformed"):
        preprocess(inputs, str(tmp_path / "again"), job, Options(restart=True))


def test_a_damaged_journal_is_named(tmp_path: Path, inputs: list[str]) -> None:
    path = tmp_path / "out_text_document.journal"
    for content in ("{", "[]", '{"done": 1}', '{"version": 2, "settings": {}, "done": {}}'):
        path.write_text(content)
        with pytest.raises(UserError, match=f"{path} is damaged; --restart"):
            preprocess(inputs, str(tmp_path / "out"), BYTES)
    preprocess(inputs, str(tmp_path / "out"), BYTES, Options(restart=True))
    assert not path.exists()


def test_two_runs_do_not_write_the_same_output(tmp_path: Path, inputs: list[str]) -> None:
    with TokenFileWriter(str(tmp_path / "out_text_document"), np.dtype(np.uint16)):
        with pytest.raises(UserError, match="another process is writing"):
            preprocess(inputs, str(tmp_path / "out"), BYTES)
    preprocess(inputs, str(tmp_path / "out"), BYTES)


def test_restart_leaves_the_journal_of_a_run_that_is_alive(tmp_path: Path, inputs: list[str]) -> None:
    break_file(inputs[5])
    with pytest.raises(UserError, match="malformed"):
        preprocess(inputs, str(tmp_path / "out"), BYTES)
    journal = tmp_path / "out_text_document.journal"
    before = journal.read_bytes()
    with TokenFileWriter(str(tmp_path / "out_text_document"), np.dtype(np.uint16)):
        with pytest.raises(UserError, match="another process is writing"):
            preprocess(inputs, str(tmp_path / "out"), BYTES, Options(restart=True))
        assert journal.read_bytes() == before
