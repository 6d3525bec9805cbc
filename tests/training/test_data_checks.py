"""What training checks of its data when it starts, goes on and saves."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import socket
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from megatron_tokenformer.checkpoint.manifest import read_manifest
from megatron_tokenformer.checkpoint.store import complete_checkpoints, find_checkpoint
from megatron_tokenformer.config.growth import Growth
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.data.batches import open_blend
from megatron_tokenformer.data.provenance import TokenizerRecord
from megatron_tokenformer.data.tokenizer_training import train_tokenizer
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.parallel.layout import Layout
from megatron_tokenformer.training.loop import save, train
from megatron_tokenformer.training.run import open_run
from tests.checkpoint.growing import grow
from tests.data.runs import json_lines
from tests.descriptions import describe
from tests.ranks import run_ranks
from tests.toy import toy_config, write_tokens

ONE, OTHER = "a" * 64, "b" * 64


def outcome(layout: Layout, config: RunConfig) -> str:
    """Train; return what was said, or the mistake and its exit code."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            train(config, layout)
    except UserError as error:
        return f"{error} ({error.exit_code})"
    return said.getvalue()


def outcomes(layout: Layout, configs: list[RunConfig]) -> list[str]:
    return [outcome(layout, config) for config in configs]


def short(folder: Path, name: str = "run", **sections: dict[str, Any]) -> RunConfig:
    """The toy for two steps, in a run folder of this name."""
    training = {"steps": 2, "micro_batch_size": 4, "eval_steps": 1, **sections.pop("training", {})}
    config = toy_config(folder, training=training, **sections)
    return config.model_copy(update={"run_dir": str(folder / name)})


def write_at(path: str, at: int, form: str, value: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(struct.pack(form, value))


def test_a_damaged_pair_of_each_kind_is_refused_by_name(tmp_path: Path) -> None:
    documents = 10  # of 100 tokens, so the tables of the index begin at 34, 74 and 154
    harms: dict[str, Any] = {
        "magic": lambda p: write_at(f"{p}.idx", 0, "<B", 0),
        "header": lambda p: write_at(f"{p}.idx", 18, "<Q", 11),
        "short-index": lambda p: os.truncate(f"{p}.idx", 100),
        "first-pointer": lambda p: write_at(f"{p}.idx", 74, "<q", 2),
        "first-boundary": lambda p: write_at(f"{p}.idx", 154, "<q", 1),
        "last-boundary": lambda p: write_at(f"{p}.idx", 154 + 8 * documents, "<q", 9),
        "last-pointer": lambda p: write_at(f"{p}.idx", 154 - 8, "<q", 0),
        "last-length": lambda p: write_at(f"{p}.idx", 74 - 4, "<i", 99),
        "short-bin": lambda p: os.truncate(f"{p}.bin", 1000),
        "counts": lambda p: describe(p, tokens=1),
        "description": lambda p: Path(f"{p}.json").write_text("{"),
    }
    configs = []
    for name, harm in harms.items():
        prefix = write_tokens(tmp_path, name, tokens=100 * documents)
        harm(prefix)
        key = "validation" if name == "magic" else "train"
        configs.append(short(tmp_path, data={key: prefix}))
    (said,) = run_ranks(1, outcomes, configs)
    for name, words in zip(harms, said):
        assert f"/{name}_text_document" in words and "is damaged" in words, words
        assert words.endswith("(1)"), words
    assert not (tmp_path / "run").exists(), "nothing is written for a run that does not start"


def test_data_of_two_tokenizers_are_refused(tmp_path: Path) -> None:
    one, bare = describe(write_tokens(tmp_path, "one"), ONE), write_tokens(tmp_path, "bare")
    other = describe(write_tokens(tmp_path, "other"), OTHER)
    model = tmp_path / "tokenizer.json"
    (tmp_path / "a.jsonl").write_bytes(json_lines(["some text"]))
    train_tokenizer([str(tmp_path / "a.jsonl")], "HFTokenizer", 260, str(model))
    fingerprint = hashlib.sha256(model.read_bytes()).hexdigest()
    right = describe(write_tokens(tmp_path, "right"), fingerprint, str(model))
    tokenizer = {"type": "HFTokenizer", "model": str(model)}
    configs = [
        short(tmp_path, data={"train": [[1, one], [1, bare], [1, other]]}),
        short(tmp_path, data={"train": one, "validation": other}),
        short(tmp_path, data={"train": one, "validation": bare, "tokenizer": tokenizer}),
        short(tmp_path, data={"train": right, "validation": bare, "tokenizer": tokenizer}),
    ]
    (said,) = run_ranks(1, outcomes, configs)
    for words in said[:2]:
        assert (
            f"{one} was made with a.json (hash {ONE[:12]}), {other} with b.json (hash {OTHER[:12]})" in words
        )
        assert words.endswith("(2)")
    assert f"data.tokenizer is {model} (hash " in said[2] and f"a.json (hash {ONE[:12]})" in said[2]
    assert said[2].endswith("(2)")
    assert said[3].count("cannot be checked") == 1 and f"cannot be checked: {bare}\n" in said[3]
    assert "saved " in said[3]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of two steps on described data."""
    folder = tmp_path_factory.mktemp("trained")
    describe(write_tokens(folder), ONE, "first.json")
    (said,) = run_ranks(1, outcome, short(folder))
    assert "saved " in said
    return folder


def test_a_checkpoint_records_tokenizer_and_tokens_and_growth_carries_them(
    trained: Path, tmp_path: Path
) -> None:
    path = find_checkpoint(trained / "run")
    manifest = read_manifest(path)
    assert manifest.tokenizer == TokenizerRecord("HFTokenizer", ONE, 64, "first.json", 0)
    assert manifest.source_tokens == {str(trained / "toy_text_document"): 40_000}
    target = toy_config(trained, model={"tokens": {"qkv": 32, "output": 32, "ffn": 64}})
    grown, _ = grow(path, target, tmp_path / "grown", Growth())
    assert read_manifest(grown).tokenizer == manifest.tokenizer
    assert read_manifest(grown).source_tokens == manifest.source_tokens


def test_going_on_with_data_of_another_tokenizer_is_refused(trained: Path, tmp_path: Path) -> None:
    other = describe(write_tokens(tmp_path, "other"), OTHER, "second.json")
    data = {"train": other, "validation": []}
    shutil.copytree(trained / "run", tmp_path / "run")
    larger = {"tokens": {"qkv": 32, "output": 32, "ffn": 64}}
    grow(find_checkpoint(trained / "run"), toy_config(tmp_path, model=larger), tmp_path / "grown", Growth())
    configs = [
        short(tmp_path, data=data, training={"steps": 4}),  # a resume
        short(tmp_path, "loaded", data=data, checkpoint={"load": str(trained / "run")}),
        short(tmp_path, "stage", data=data, model=larger, checkpoint={"load": str(tmp_path / "grown")}),
    ]
    (said,) = run_ranks(1, outcomes, configs)
    for words in said:
        assert f"first.json (hash {ONE[:12]})" in words and f"second.json (hash {OTHER[:12]})" in words
        assert "preprocess the data with the checkpoint's tokenizer, or train from the start" in words
        assert words.endswith("(2)")


def test_data_without_a_description_go_on_and_the_checkpoint_keeps_its_tokenizer(
    trained: Path, tmp_path: Path
) -> None:
    bare = write_tokens(tmp_path)
    shutil.copytree(trained / "run", tmp_path / "run")
    data = {"train": bare, "validation": []}
    (said,) = run_ranks(1, outcome, short(tmp_path, data=data, training={"steps": 4}))
    assert f"note: no .json, so vocabulary and tokenizer cannot be checked: {bare}\n" in said
    manifest = read_manifest(find_checkpoint(tmp_path / "run"))
    assert manifest.tokenizer is not None and manifest.tokenizer.fingerprint == ONE


def test_a_manifest_from_before_these_fields_is_read_and_gone_on_from(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    path = find_checkpoint(tmp_path / "run") / "manifest.json"
    stored = json.loads(path.read_text())
    assert stored.pop("tokenizer")["fingerprint"] == ONE
    del stored["source_tokens"]
    path.write_text(json.dumps(stored))
    manifest = read_manifest(path.parent)
    assert (manifest.version, manifest.tokenizer, manifest.source_tokens) == (1, None, {})
    data = {"train": describe(write_tokens(tmp_path), OTHER), "validation": []}
    (said,) = run_ranks(1, outcome, short(tmp_path, data=data, training={"steps": 4}))
    assert "at step 2" in said and "saved " in said
    recorded = read_manifest(find_checkpoint(tmp_path / "run")).tokenizer
    assert recorded is not None and recorded.fingerprint == OTHER


def test_a_damaged_record_of_the_tokenizer_is_told_as_damage(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    path = find_checkpoint(tmp_path / "run") / "manifest.json"
    stored = json.loads(path.read_text())
    del stored["tokenizer"]["fingerprint"]
    path.write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"is damaged: tokenizer\.fingerprint"):
        read_manifest(path.parent)


def test_a_source_that_grew_since_the_save_is_told_at_the_resume(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path, tokens=4000)
    run_ranks(1, outcome, short(tmp_path))
    (same,) = run_ranks(1, outcome, short(tmp_path, training={"steps": 3}))
    assert "at step 2" in same and "another order" not in same
    write_tokens(tmp_path, tokens=5000)
    (said,) = run_ranks(1, outcome, short(tmp_path, training={"steps": 4}))
    assert f"note: {prefix} had 4,000 tokens and has 5,000, so samples come in another order" in said


def change_then_save(layout: Layout, folder: Path, change: str) -> str:
    """Each rank has a copy of its own; that of rank 1 changes under the run, which then saves."""
    os.chdir(folder / f"rank-{layout.rank}")
    names = {"train": "toy_text_document", "validation": "toy_text_document"}
    config = short(folder, change, data=names)
    try:
        with open_run(config, layout) as run:
            save(run)
            dist.barrier()
            if layout.rank == 1:
                CHANGES[change]()
            run.progress.step += 1
            save(run)
    except UserError as error:
        return f"{error} ({error.exit_code})"
    return "saved"


def _copy() -> None:
    shutil.copy2("toy_text_document.bin", "new")
    os.replace("new", "toy_text_document.bin")


def _replace() -> None:
    shutil.copy("toy_text_document.bin", "new")
    write_at("new", 7000, "<H", 1)
    shutil.copystat("toy_text_document.bin", "new")
    os.replace("new", "toy_text_document.bin")


NO_CHANGES: dict[str, Any] = {"nothing": lambda: None, "a copy of the same": _copy}
CHANGES: dict[str, Any] = {
    **NO_CHANGES,
    "replaced": _replace,
    "truncated": lambda: os.truncate("toy_text_document.bin", 100),
    "rewritten": lambda: write_at("toy_text_document.bin", 7000, "<H", 1),
}


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    """A folder with a copy of the data for each of two ranks, which was written long ago."""
    prefix = write_tokens(tmp_path)
    for rank in (0, 1):
        (tmp_path / f"rank-{rank}").mkdir()
        for suffix in (".bin", ".idx"):
            copy = tmp_path / f"rank-{rank}" / f"toy_text_document{suffix}"
            shutil.copy(prefix + suffix, copy)
            os.utime(copy, (1_000_000_000, 1_000_000_000))
    return tmp_path


@pytest.mark.parametrize("change", CHANGES)
def test_no_checkpoint_is_written_when_the_data_of_any_rank_changed(copies: Path, change: str) -> None:
    said = run_ranks(2, change_then_save, copies, change)
    kept = [path.name for path in complete_checkpoints(copies / change / "checkpoints")]
    if change in NO_CHANGES:
        assert said == ["saved"] * 2 and kept == ["step-00000000", "step-00000001"]
        return
    assert kept == ["step-00000000"]
    for words in said:
        assert words.startswith(f"checkpoint of step 1 not written: rank 1 on {socket.gethostname()}: ")
        assert "toy_text_document was changed or replaced while the run was reading it" in words
        assert words.endswith("(1)")


def open_here(layout: Layout, folder: Path, names: dict[str, Any]) -> str:
    os.chdir(folder / f"rank-{layout.rank}")
    return outcome(layout, short(folder, data=names))


@pytest.mark.parametrize(
    ("suffix", "at", "words"),
    [
        (".bin", 0, "(40,000 tokens in 400 documents here, 40,000 in 400 there)"),
        (".bin", 79_998, "(40,000 tokens in 400 documents here, 40,000 in 400 there)"),
        (".idx", None, "(4,000 tokens in 40 documents here, 40,000 in 400 there)"),
    ],
)
def test_other_data_on_one_rank_stop_all(copies: Path, suffix: str, at: int | None, words: str) -> None:
    theirs = str(copies / "rank-1" / "toy_text_document")
    if at is None:
        write_tokens(copies / "rank-1", tokens=4000)
    else:
        write_at(theirs + suffix, at, "<H", 63)
    # The blend names the common source first, so that the one that differs must be named.
    names = {"train": [[1, str(copies / "toy_text_document")], [1, "toy_text_document"]], "validation": []}
    for said in run_ranks(2, open_here, copies, names):
        assert said.startswith(
            f"rank 1 on {socket.gethostname()}: toy_text_document is other data than on the main rank {words}"
        )
        assert said.endswith("(1)")


def test_equal_copies_on_every_rank_are_trained_on(copies: Path) -> None:
    names = {"train": "toy_text_document", "validation": "toy_text_document"}
    first, _ = run_ranks(2, open_here, copies, names)
    assert "saved " in first


def read_together(layout: Layout, sources: list[tuple[float, str]]) -> list[int]:
    dist.barrier()
    blend = open_blend(sources, 32, seed=1)
    blend.identities()
    found = [int(blend[position].sum()) for position in range(50)]
    blend.check_unchanged()
    return found


def test_eight_processes_open_a_blend_in_a_folder_that_nobody_may_write(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    sources = [(3.0, describe(write_tokens(folder, "a"))), (1.0, write_tokens(folder, "b", seed=1))]

    def look() -> dict[str, tuple[int, int]]:
        return {
            str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in (folder, *folder.iterdir())
        }

    for path in (*folder.iterdir(), folder):
        path.chmod(path.stat().st_mode & ~0o222)
    before = look()
    found = run_ranks(8, read_together, sources)
    after = look()
    folder.chmod(0o755)
    assert after == before, "the superuser may write all the same, so look"
    assert found == [found[0]] * 8
    assert len(np.unique(found[0])) > 25
