"""Shrinking: the tokens of least |K| |V| go and nothing else, and what is left trains on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import xxhash

from benchmarks.growth import write_checkpoint
from megatron_tokenformer.checkpoint import shrink
from megatron_tokenformer.checkpoint.manifest import STATES, read_manifest
from megatron_tokenformer.checkpoint.shards import verify_checkpoint
from megatron_tokenformer.checkpoint.store import find_checkpoint
from megatron_tokenformer.commands.grow_checkpoint import main
from megatron_tokenformer.config.load import load_config
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.evaluation.perplexity import evaluate, open_evaluation
from megatron_tokenformer.metrics_file import read_rows
from tests.checkpoint.test_grow import values
from tests.checkpoint.test_grow_tool import last_line
from tests.ranks import run_ranks
from tests.toy import toy_config, train_toy, write_tokens

FEWER = "qkv=9,output=16,ffn=40"
LARGER = "qkv=32,output=24,ffn=96"
PATTENTIONS = ("attention.query", "attention.key", "attention.value", "attention.output", "ffn")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "run/checkpoints", toy_config(tmp_path), ranks=3)


def resize(source: Path, *words: str, save: str = "out") -> Path:
    """Run the tool beside the source; the new checkpoint."""
    folder = source.parents[2] / save
    assert main(["--load", str(source), "--save", str(folder), *words]) == 0
    return folder if "--dry-run" in words else find_checkpoint(folder)


def kept_by_brute_force(path: Path, pattention: str, count: int) -> list[int]:
    """Rows of the largest product of norms, found by sorting all of them."""
    reach = [
        float(torch.linalg.vector_norm(key.double()) * torch.linalg.vector_norm(value.double()))
        for key, value in zip(*(values(path, f"{pattention}.{kind}_tokens") for kind in ("key", "value")))
    ]
    return sorted(sorted(range(len(reach)), key=lambda row: reach[row], reverse=True)[:count])


@pytest.mark.parametrize("block", [100, shrink.BLOCK_ELEMENTS])
def test_rows_that_go_are_those_of_least_reach_and_the_others_stay_as_they_are(
    source: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shrink, "BLOCK_ELEMENTS", block)
    path = resize(source, "--shrink", "--tokens", FEWER)
    verify_checkpoint(path)
    for layer in range(2):
        for name, count in zip(PATTENTIONS, (9, 9, 9, 16, 40)):
            rows = kept_by_brute_force(source, f"layers.{layer}.{name}", count)
            assert len(rows) == count
            for kind in ("key_tokens", "value_tokens"):
                tensor = f"layers.{layer}.{name}.{kind}"
                for state in STATES:
                    assert torch.equal(values(path, tensor, state), values(source, tensor, state)[rows])
    for state in STATES:
        assert torch.equal(values(path, "embedding.weight", state), values(source, "embedding.weight", state))
    old, new = read_manifest(source), read_manifest(path)
    assert (new.taus, new.adam_step, new.position, new.step) == (old.taus, old.adam_step, old.position, 0)


def test_a_growth_is_undone_to_the_last_bit(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grown = resize(source, "--tokens", LARGER, save="grown")
    path = resize(grown, "--shrink", "--tokens", "qkv=16,output=16,ffn=64", "--json")
    told = last_line(capsys)
    assert told["exact"] is True and told["reach"]["qkv"]["dropped"] == 0
    old, new = read_manifest(source), read_manifest(path)
    assert (new.shapes, new.taus, new.adam_step) == (old.shapes, old.taus, old.adam_step)
    for name in old.shapes:
        if not name.startswith("final_norm"):
            for state in STATES:
                assert torch.equal(values(path, name, state), values(source, name, state)), name
    assert [entry["kind"] for entry in new.history] == ["growth", "shrink"]
    prefix = str(source.parents[2] / "toy_text_document")
    losses = [evaluate(open_evaluation(p, [prefix], max_tokens=500))[0].val_loss for p in (source, path)]
    assert losses[0] == losses[1]


def test_tokens_with_keys_but_no_values_go_first_and_are_missed(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grown = resize(source, "--tokens", LARGER, "--keys", "normal", "--values", "zero", save="grown")
    path = resize(grown, "--shrink", "--tokens", "qkv=16,output=16,ffn=64", "--json")
    assert last_line(capsys)["exact"] is False, "their keys were part of the norm"
    name = "layers.1.ffn.key_tokens"
    assert torch.equal(values(path, name), values(source, name))
    assert read_manifest(path).history[-1]["exact"] is False


def test_the_report_tells_mean_reaches_and_how_to_measure(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = resize(source, "--shrink", "--tokens", FEWER, "--json")
    *lines, last = capsys.readouterr().out.splitlines()
    told = json.loads(last)
    reach = torch.cat(
        [
            values(source, f"layers.{layer}.ffn.key_tokens").double().norm(dim=1)
            * values(source, f"layers.{layer}.ffn.value_tokens").double().norm(dim=1)
            for layer in range(2)
        ]
    )
    kept = torch.cat(
        [
            torch.tensor(kept_by_brute_force(source, f"layers.{layer}.ffn", 40)) + 64 * layer
            for layer in range(2)
        ]
    )
    dropped = torch.ones(128, dtype=torch.bool).index_fill(0, kept, False)
    assert told["reach"]["ffn"]["kept"] == pytest.approx(reach[kept].mean().item())
    assert told["reach"]["ffn"]["dropped"] == pytest.approx(reach[dropped].mean().item())
    assert told["reach"]["output"]["dropped"] is None
    assert told["reach"] == read_manifest(path).history[-1]["reach"]
    assert [line.split()[:4] for line in lines[3:6]] == [
        ["qkv", "16", "7", "9"],
        ["output", "16", "0", "16"],
        ["ffn", "64", "24", "40"],
    ]
    prefix = source.parents[2] / "toy_text_document"
    for checkpoint in (source, path):
        assert f"  python tools/evaluate.py --load {checkpoint} --data {prefix}" in lines


def test_both_losses_are_measured_if_data_are_given(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (write_tokens(source.parents[2], name, tokens=200, seed=9) for name in ("one", "two"))
    words = ["--data", one, "--data", two, "--max-tokens", "150", "--json"]
    for target in (["--shrink", "--tokens", FEWER], ["--tokens", LARGER]):
        path = resize(source, *target, *words, "data.sequence_length=64")
        out = capsys.readouterr().out
        told = json.loads(out.splitlines()[-1])["losses"]
        assert [row["data"] for row in told] == [one, two]
        before, after = (
            evaluate(open_evaluation(p, [one], max_tokens=150, sequence_length=32))[0].val_loss
            for p in (source, path)
        )
        assert (told[0]["before"], told[0]["after"], told[0]["tokens"]) == (before, after, 150)
        assert f"loss on {one}: {before:.6f} before, {after:.6f} after" in out
        assert "tools/evaluate.py" not in out
        assert (after == pytest.approx(before, rel=1e-6)) == ("--shrink" not in target)


@pytest.mark.parametrize("kind", ["l2_norm_gelu", "softmax"])
def test_what_is_left_trains_on_under_another_layout(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    validation = write_tokens(tmp_path, "validation", tokens=16 * 32 + 1, seed=1)
    data, model = {"validation": validation}, {"score_norm": kind}
    config = toy_config(tmp_path, model=model, data=data, training={"micro_batch_size": 4})
    run_ranks(1, train_toy, config)
    path = resize(
        find_checkpoint(config.run_dir),
        *("--shrink", "--tokens", "qkv=12,output=8,ffn=32", "--data", validation, "--json"),
        *(f"run_dir={tmp_path}/next", "parallel.tensor=2", "training.steps=20"),
    )
    measured = last_line(capsys)["losses"][0]
    following = load_config(path.parent / "config.yaml")
    run_ranks(2, train_toy, following, tensor=2)
    rows = read_rows(tmp_path / "next/metrics.jsonl")
    first, last = (row["val_loss"] for row in rows if "val_loss" in row)
    assert first == pytest.approx(measured["after"], rel=1e-6)
    assert last < first
    assert read_manifest(path).val_loss is None, "nobody has measured it in training"
    assert read_manifest(path).history[-1]["val_loss"] == pytest.approx(measured["before"], rel=1e-6)
    assert read_manifest(find_checkpoint(tmp_path / "next")).history == read_manifest(path).history


def test_reset_drops_the_moments(source: Path) -> None:
    path = resize(source, "--shrink", "--tokens", FEWER, "--optimizer", "reset")
    manifest = read_manifest(path)
    assert (manifest.states, manifest.adam_step) == (["weight"], 0)
    rows = kept_by_brute_force(source, "layers.0.ffn", 40)
    name = "layers.0.ffn.value_tokens"
    assert torch.equal(values(path, name), values(source, name)[rows])


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: xxhash.xxh3_128(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_the_source_is_left_as_it_is_and_a_second_time_replaces_the_first(source: Path) -> None:
    before = hashes(source)
    resize(source, "--shrink", "--tokens", FEWER)
    path = resize(source, "--shrink", "--tokens", "ffn=8")
    assert hashes(source) == before
    assert sorted(p.name for p in path.parent.iterdir()) == ["config.yaml", "latest", "step-00000000"]
    assert read_manifest(path).config["model"]["tokens"] == {"qkv": 16, "output": 16, "ffn": 8}


@pytest.mark.parametrize("options", [[], ["--optimizer", "reset"]])
def test_a_dry_run_tells_the_sizes_and_writes_nothing(
    source: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--shrink", "--tokens", FEWER, *options, "--json"]
    assert not resize(source, *words, "--dry-run").exists()
    told = last_line(capsys)
    path = resize(source, *words)
    done = last_line(capsys)
    assert {key for key in told if told[key] != done[key]} <= {"path", "bytes_free_before", "exact"}
    assert (told["path"], told["exact"], done["path"]) == (None, None, str(path))
    size = (path / "shrunk-001.safetensors").stat().st_size
    assert 0 <= size - told["bytes_new"] < 0.2 * size, "all but the header"


def test_a_damaged_shard_is_not_shrunk(source: Path) -> None:
    shard = source / read_manifest(source).shards[1].file
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match="is damaged: its hash is not the manifest's"):
        resize(source, "--shrink", "--tokens", FEWER)
    assert not list((source.parents[2] / "out").iterdir())


@pytest.mark.parametrize(
    "words, told",
    [
        (["--tokens", "ffn=96"], "shrinking adds no tokens: model.tokens.ffn was 64, the config has 96"),
        (["--tokens", "ffn=64"], "nothing shrinks"),
        (["--tokens", FEWER, "model.layers=1"], "shrinking keeps model.layers: it was 2, the config has 1"),
        (["--target-params", "1M"], "is no shrinking"),
        (["--tokens", "ffn=9", "parallel.tensor=2"], "model.tokens.ffn=9 is not divisible"),
        (["--tokens", FEWER, "--link"], "--link is for growth"),
        (["--tokens", FEWER, "--link", "--no-verify"], "--link is for growth"),
        (["--tokens", FEWER, "--keys", "zero"], "--keys is for growth"),
        (["--tokens", FEWER, "--values", "normal"], "--values is for growth"),
        (["--tokens", FEWER, "--tau", "sqrt"], "--tau is for growth"),
        (["--tokens", FEWER, "--tau-steps", "4"], "--tau-steps is for growth"),
        (["--tokens", FEWER, "--old-token-noise", "0.1"], "--old-token-noise is for growth"),
        (["--tokens", FEWER, "--allow-inexact"], "--allow-inexact is for growth"),
        (["--tokens", FEWER, "--dry-run", "--data", "x"], "--data measures what was written"),
        (["--tokens", FEWER, "--max-tokens", "5"], "--max-tokens goes with --data"),
        (["--tokens", FEWER, "--data", "nothing"], "nothing"),
        (["--tokens", FEWER, "run_dir=x", "--data", "one", "two"], "of its own: --data one --data two"),
    ],
)
def test_what_cannot_be_meant_is_refused(source: Path, words: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        resize(source, "--shrink", *words)
    assert not (source.parents[2] / "out").exists()


def test_a_runs_own_folder_is_not_shrunk_into(source: Path) -> None:
    with pytest.raises(UserError, match="so it is a run's; shrink into a folder of its own"):
        main(["--shrink", "--load", str(source), "--save", str(source.parent), "--tokens", FEWER])
