"""Evaluation: equal to the run's own validation and to a plain loop, whatever wrote the checkpoint."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from megatron_tokenformer.checkpoint.manifest import read_manifest
from megatron_tokenformer.checkpoint.store import find_checkpoint
from megatron_tokenformer.commands.evaluate import main
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.data.indexed import TokenFile, TokenFileWriter
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.evaluation import perplexity
from megatron_tokenformer.evaluation.load import load_model
from megatron_tokenformer.evaluation.perplexity import evaluate, open_evaluation, total
from megatron_tokenformer.metrics_file import read_rows
from megatron_tokenformer.model.attention import _kept_tables
from megatron_tokenformer.model.language_model import LanguageModel
from megatron_tokenformer.model.tau import set_taus, taus_from_json
from megatron_tokenformer.parallel.layout import Layout
from tests.checkpoint.test_grow import values
from tests.descriptions import describe
from tests.ranks import run_ranks
from tests.toy import VOCABULARY, toy_config, train_toy, write_documents, write_tokens

LENGTH = 32
CPU = torch.device("cpu")


def write_ids(folder: Path, name: str, ids: Sequence[int]) -> str:
    """A dataset of one document; its prefix."""
    prefix = str(folder / f"{name}_text_document")
    writer = TokenFileWriter(prefix, np.dtype("uint16"))
    writer.add(np.array(ids, dtype=np.uint16), np.array([len(ids)]))
    writer.finish()
    return prefix


def train_here(folder: Path, tensor: int = 1, pipeline: int = 1, **sections: dict[str, Any]) -> RunConfig:
    """Ten steps of the toy, and a validation over exactly all the windows of its validation data."""
    validation = write_tokens(folder, "validation", tokens=16 * LENGTH + 1, seed=1)
    data = {"validation": validation, **sections.pop("data", {})}
    layout, training = {"tensor": tensor, "pipeline": pipeline}, {"micro_batch_size": 4}
    config = toy_config(folder, parallel=layout, data=data, training=training, **sections)
    run_ranks(tensor * pipeline, train_toy, config, tensor=tensor, pipeline=pipeline)
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """By tensor 2 x pipeline 2."""
    return train_here(tmp_path_factory.mktemp("trained"), tensor=2, pipeline=2)


def own_validation(config: RunConfig) -> float:
    rows = read_rows(Path(config.run_dir) / "metrics.jsonl")
    return [row["val_loss"] for row in rows if "val_loss" in row][-1]


def whole_model(path: Path) -> LanguageModel:
    """The checkpoint's model, put together without the evaluation's code."""
    manifest = read_manifest(path)
    model = LanguageModel(RunConfig.model_validate(manifest.config).model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.copy_(values(path, name))
    for name in ("gain_minus_one", "bias"):
        getattr(model.final_norm, name).data.copy_(vector(path, f"final_norm.{name}"))
    set_taus(model, taus_from_json(manifest.taus), manifest.step)
    return model


def vector(path: Path, name: str) -> torch.Tensor:
    """A tensor of one dimension, read from the safetensors files themselves."""

    pieces = {}
    for file in path.glob("*.safetensors"):
        for key, piece in load_file(file).items():
            if key.startswith(f"{name}/weight/"):
                pieces[int(key.rsplit("/", 1)[1])] = piece
    return torch.cat([pieces[start] for start in sorted(pieces)])


def plain_loss(path: Path, prefix: str, length: int, limit: int | None = None) -> tuple[float, int]:
    """Mean loss and number of targets, window by window, over all logits at once."""
    model, ids = whole_model(path), TokenFile(prefix)
    stream = torch.from_numpy(ids.window(0, ids.tokens).astype(np.int64))
    stream = stream if limit is None else stream[: limit + 1]
    nats = []
    for start in range(0, len(stream) - 1, length):
        window = stream[start : start + length + 1]
        with torch.no_grad():
            logits = model(window[None, :-1])[:, 0]
        nats += F.cross_entropy(logits, window[1:], reduction="none").tolist()
    return math.fsum(nats) / len(nats), len(nats)


def evaluate_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """Run the tool; the object in its last line."""
    assert main([*words, "--json"]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return told


def test_a_checkpoint_of_tensor_and_pipeline_ranks_scores_what_its_run_measured(
    trained: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = trained.data.validation[0][1]
    told = evaluate_json(capsys, "--load", trained.run_dir, "--data", prefix)
    assert told["val_loss"] == pytest.approx(own_validation(trained), rel=1e-6)
    assert told["val_ppl"] == pytest.approx(math.exp(told["val_loss"]))
    assert (told["tokens"], told["step"], told["bits_per_byte"]) == (16 * LENGTH, 10, None)


@pytest.mark.parametrize("isolate, mask", [(True, False), (False, True), (True, True)])
def test_documents_are_treated_as_in_the_runs_own_validation(
    tmp_path: Path, isolate: bool, mask: bool
) -> None:
    training = write_documents(tmp_path, "training")
    prefix = write_documents(tmp_path, "validation", documents=100, seed=2)
    windows = (TokenFile(prefix).tokens - 1) // LENGTH  # the run's validation leaves out what is left over
    data = {"train": training, "validation": prefix, "isolate_documents": isolate, "eod_mask_loss": mask}
    options = {"global_batch_size": windows, "eval_steps": 1, "steps": 2}
    config = toy_config(tmp_path, data=data, training=options)
    run_ranks(1, train_toy, config)
    (score,) = evaluate(open_evaluation(config.run_dir, [prefix], max_tokens=windows * LENGTH))
    assert score.val_loss == pytest.approx(own_validation(config), rel=1e-6)
    (other,) = evaluate(
        open_evaluation(
            config.run_dir,
            [prefix],
            max_tokens=windows * LENGTH,
            isolate_documents=False,
            eod_mask_loss=False,
        )
    )
    assert other.val_loss != pytest.approx(score.val_loss, rel=1e-4), "the options do something here"
    assert (other.tokens > score.tokens) == mask


@pytest.mark.parametrize("length, limit", [(None, None), (20, None), (50, 333), (32, 7), (600, None)])
@pytest.mark.parametrize("logits_at_once", [1, 64 * 37, perplexity.LOGITS_AT_ONCE])
def test_every_target_counts_once_the_last_short_window_included(
    trained: RunConfig,
    length: int | None,
    limit: int | None,
    logits_at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(perplexity, "LOGITS_AT_ONCE", logits_at_once)
    prefix = trained.data.validation[0][1]
    opened = open_evaluation(
        trained.run_dir, [prefix], sequence_length=length, max_tokens=limit, micro_batch_size=3
    )
    (score,) = evaluate(opened)
    loss, targets = plain_loss(find_checkpoint(trained.run_dir), prefix, length or LENGTH, limit)
    assert (score.val_loss, score.tokens) == (pytest.approx(loss, rel=1e-6), targets)


def test_tau_is_that_of_the_checkpoints_step(trained: RunConfig) -> None:
    path = find_checkpoint(trained.run_dir)
    manifest = read_manifest(path)
    schedule = {"start": 1.0, "end": 21.0, "steps": 20}
    manifest.taus["ffn"] = schedule
    model = load_model(path, manifest, "fp32", CPU)
    assert {layer.ffn.tau for layer in model.layers} == {11.0}


def test_tensors_that_are_not_those_of_the_config_are_refused(trained: RunConfig) -> None:
    path = find_checkpoint(trained.run_dir)
    manifest = read_manifest(path)
    manifest.config["model"]["tokens"]["ffn"] = 62
    with pytest.raises(UserError, match=r"layers\.0\.ffn\.key_tokens of shape \[64, 32\].*\[62, 32\]"):
        load_model(path, manifest, "fp32", CPU)


def test_bits_per_byte_are_those_of_the_text_and_in_proportion_for_a_part(
    trained: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = describe(write_tokens(tmp_path, "one", tokens=301, seed=3), text_bytes=1_234)
    two = describe(write_tokens(tmp_path, "two", tokens=501, seed=4), text_bytes=4_321)
    path = find_checkpoint(trained.run_dir)
    told = evaluate_json(capsys, "--load", trained.run_dir, "--data", one, two)
    bits = [plain_loss(path, prefix, LENGTH)[0] * n / math.log(2) for prefix, n in ((one, 300), (two, 500))]
    rows = told["datasets"]
    assert [row["data"] for row in rows] == [one, two]
    assert [row["tokens"] for row in rows] == [300, 500]
    assert rows[0]["bits_per_byte"] == pytest.approx(bits[0] / 1_234, rel=1e-6)
    assert told["bits_per_byte"] == pytest.approx(sum(bits) / (1_234 + 4_321), rel=1e-6)
    assert told["val_loss"] == pytest.approx(sum(bits) * math.log(2) / 800, rel=1e-6)
    again = evaluate_json(capsys, "--load", trained.run_dir, "--data", one, "--data", two)
    assert again == told, "each dataset may have a --data of its own"
    part = evaluate_json(capsys, "--load", trained.run_dir, "--data", one, "--max-tokens", "75")
    loss, _ = plain_loss(path, one, LENGTH, 75)
    assert part["bits_per_byte"] == pytest.approx(loss / math.log(2) * 300 / 1_234, rel=1e-6)


def test_without_a_description_there_are_no_bits_per_byte_and_a_note_says_so(
    trained: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = write_tokens(tmp_path, "bare", tokens=101)
    described = describe(write_tokens(tmp_path, "told", tokens=101), text_bytes=9)
    assert main(["--load", trained.run_dir, "--data", bare, described, "--json"]) == 0
    *_, note, last = capsys.readouterr().out.splitlines()
    assert note == f"note: no bits per byte: no description tells the text_bytes of {bare}"
    told = json.loads(last)
    assert told["bits_per_byte"] is None
    assert [row["bits_per_byte"] is None for row in told["datasets"]] == [True, False]


def test_components_that_descriptions_tell_have_a_column_and_a_pattern_names_them(
    trained: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {"arxiv": "ArXiv", "github": "Github", "rest": None}
    prefixes = []
    for name, component in parts.items():
        more = {"component": component} if component else {}
        prefixes.append(describe(write_tokens(tmp_path, f"val_{name}", tokens=101), text_bytes=9, **more))
    words = ["--load", trained.run_dir, "--data", str(tmp_path / "val_*_text_document"), "--json"]
    assert main(words) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    told = json.loads(last)["datasets"]
    assert [(row["data"], row["component"]) for row in told] == list(zip(prefixes, parts.values()))
    header, *rows, total_row = lines[-5:]
    assert header.split()[:2] == ["dataset", "component"]
    assert [row.split()[1] for row in (*rows, total_row)] == ["ArXiv", "Github", "-", "-"]
    assert main(["--load", trained.run_dir, "--data", str(tmp_path / "none_*")]) == 2


def evaluate_here(layout: Layout, run_dir: str, prefixes: list[str]) -> list[tuple[float, int]]:
    """On this rank, for `run_ranks`."""
    scores = evaluate(open_evaluation(run_dir, prefixes, micro_batch_size=3), layout=layout)
    return [(score.nats, score.tokens) for score in [*scores, total(scores)]]


def test_several_processes_find_what_one_does(trained: RunConfig, tmp_path: Path) -> None:
    prefixes = [write_tokens(tmp_path, name, tokens=n, seed=n) for name, n in (("a", 1_001), ("b", 40))]
    alone = evaluate(open_evaluation(trained.run_dir, prefixes, micro_batch_size=3))
    expected = [(score.nats, score.tokens) for score in [*alone, total(alone)]]
    for found in run_ranks(3, evaluate_here, trained.run_dir, prefixes):
        assert [tokens for _, tokens in found] == [tokens for _, tokens in expected]
        assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected], rel=1e-12)


def test_a_model_still_learns_in_a_process_that_has_evaluated(trained: RunConfig) -> None:
    _kept_tables.cache_clear()
    evaluate(open_evaluation(trained.run_dir, [trained.data.validation[0][1]]))
    model = LanguageModel(trained.model)
    model(torch.zeros(1, LENGTH, dtype=torch.long)).sum().backward()
    assert model.layers[0].attention.query.key_tokens.grad is not None


def test_a_flipped_byte_is_found_if_asked_for(
    trained: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(find_checkpoint(trained.run_dir), tmp_path / "step-00000010"))
    shard = path / read_manifest(path).shards[-1].file
    words = ["--load", str(path), "--data", trained.data.validation[0][1]]
    assert main([*words, "--verify"]) == 0
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert main([*words, "--verify"]) == 1
    assert f"error: checkpoint shard {shard} is damaged: its hash" in capsys.readouterr().err


def test_lower_precision_is_near(trained: RunConfig) -> None:
    opened = open_evaluation(trained.run_dir, [trained.data.validation[0][1]])
    (exact,), (near,) = evaluate(opened), evaluate(opened, "bf16")
    assert near.val_loss == pytest.approx(exact.val_loss, rel=2e-2)
    assert near.val_loss != exact.val_loss


def test_a_tokenizer_that_is_not_the_checkpoints_is_refused(tmp_path: Path) -> None:
    train = describe(write_tokens(tmp_path), fingerprint="a" * 64)
    config = toy_config(tmp_path, training={"steps": 2})
    run_ranks(1, train_toy, config)
    other = describe(write_tokens(tmp_path, "other", tokens=101), fingerprint="b" * 64)
    with pytest.raises(UserError, match=r"trained on data made with a\.json .*was made with b\.json"):
        open_evaluation(config.run_dir, [train, other])


@pytest.mark.parametrize(
    "words, code, told",
    [
        (["--load", "nowhere"], 2, "no complete checkpoint at nowhere"),
        (["--data", "nothing"], 2, "nothing"),
        (["--sequence-length", "0"], 2, "--sequence-length 0 is too small; it must be at least 1"),
        (["--max-tokens", "-1"], 2, "--max-tokens -1 is too small"),
        (["--data", "{large}"], 1, f"token id {VOCABULARY} in .*model.vocab_size is {VOCABULARY}"),
        (["--data", "{many}"], 2, f"has 999 token ids, .*model.vocab_size is {VOCABULARY}"),
        (["--data", "{one}"], 2, "has 1 tokens; to predict one takes 2"),
        (["--isolate-documents"], 2, "needs the id that ends its documents; .*here: --eod-id ID"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_words(
    trained: RunConfig,
    tmp_path: Path,
    words: list[str],
    code: int,
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path
    bad = {
        "large": write_ids(folder, "large", [1, 2, VOCABULARY]),
        "many": describe(write_ids(folder, "many", [1, 2, 3]), tokenizer={"vocab_size": 999}),
        "one": write_ids(folder, "one", [1]),
    }
    given = ["--load", trained.run_dir, "--data", trained.data.validation[0][1], *words]
    assert main([word.format(**bad) for word in given]) == code
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert re.search(told, error), error


def test_one_process_needs_neither_deepspeed_nor_megatron(trained: RunConfig) -> None:

    code = (
        "import sys; from megatron_tokenformer.commands.evaluate import main; "
        "assert main(sys.argv[1:]) == 0; "
        "assert not {'deepspeed', 'megatron'} & sys.modules.keys()"
    )
    words = ["--load", trained.run_dir, "--data", trained.data.validation[0][1]]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
