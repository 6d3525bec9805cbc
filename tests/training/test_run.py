"""Opening a run: what does not fit together is refused in words, and what changes the samples is said."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_tokenformer.checkpoint.manifest import read_manifest
from megatron_tokenformer.checkpoint.store import find_checkpoint
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.data.indexed import TokenFileWriter
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.parallel.layout import Layout
from megatron_tokenformer.training.announce import order_changes
from megatron_tokenformer.training.loop import train
from megatron_tokenformer.training.run import check_model
from tests.ranks import run_ranks
from tests.toy import toy_config, train_toy


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of four steps."""
    folder = tmp_path_factory.mktemp("run")
    run_ranks(1, train_toy, toy_config(folder, training={"steps": 4}))
    return folder


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("attention_heads", 2, "model.attention_heads=4, the config has 2"),
        ("score_norm", "gelu_l2_norm", "model.score_norm=l2_norm_gelu, the config has gelu_l2_norm"),
        ("rotary_fraction", 1.0, "model.rotary_fraction=0.5, the config has 1.0"),
        ("hidden_size", 64, r"of shape \[64, 32\], the config's model has \[64, 64\]"),
    ],
)
def test_another_model_is_refused_even_if_its_shapes_are_the_same(
    finished: Path, key: str, value: Any, words: str
) -> None:
    path = find_checkpoint(finished / "run")
    with pytest.raises(UserError, match=words):
        check_model(path, read_manifest(path), toy_config(finished, model={key: value}).model)


def test_a_tensor_that_the_model_does_not_have_is_refused(finished: Path) -> None:
    path = find_checkpoint(finished / "run")
    manifest = read_manifest(path)
    manifest.shapes["layers.2.ffn.key_tokens"] = [64, 32]
    with pytest.raises(UserError, match=r"has layers.2.ffn.key_tokens of shape \[64, 32\]"):
        check_model(path, manifest, toy_config(finished).model)


def test_what_changes_the_order_of_samples_is_said(finished: Path) -> None:
    manifest = read_manifest(find_checkpoint(finished / "run"))
    same = toy_config(finished, parallel={"tensor": 2}, training={"global_batch_size": 4})
    assert order_changes(manifest, same, {}) == []
    other = toy_config(finished, data={"sequence_length": 16}, training={"seed": 7})
    assert order_changes(manifest, other, {}) == [
        "training.seed was 1234 and is 7",
        "data.sequence_length was 32 and is 16",
    ]


def words_of(layout: Layout, config: RunConfig) -> str:
    """Train, and return the mistake that it ends with."""
    with pytest.raises(UserError) as refused:
        train(config, layout)
    return f"{refused.value} ({refused.value.exit_code})"


def test_fewer_steps_than_are_done_are_refused(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    config = toy_config(tmp_path / "copy", training={"steps": 3})
    (words,) = run_ranks(1, words_of, config)
    assert "has done 4 steps, more than training.steps=3; training.steps=4 would work" in words


def test_an_id_beyond_the_vocabulary_stops_the_run(tmp_path: Path) -> None:
    writer = TokenFileWriter(str(tmp_path / "wide_text_document"), np.dtype("uint16"))
    writer.add(np.arange(4000, dtype=np.uint16) % 65, np.array([4000]))
    writer.finish()
    config = toy_config(tmp_path, data={"train": str(tmp_path / "wide_text_document")})
    (words,) = run_ranks(1, words_of, config)
    assert "token id 64 in" in words and "but model.vocab_size=64 (1)" in words


def hide_data_from_rank_1(layout: Layout, config: RunConfig) -> str:
    if layout.rank == 1:
        config = config.model_copy(update={"data": config.data.model_copy(update={"train": [(1.0, "gone")]})})
    try:
        train(config, layout)
    except UserError as error:
        return f"{error} ({error.exit_code})"
    except Exception as error:
        return type(error).__name__
    return "trained"


def test_a_mistake_that_only_one_rank_meets_is_told_with_that_rank_and_stops_all(tmp_path: Path) -> None:
    config = toy_config(tmp_path, training={"micro_batch_size": 2}, parallel={"timeout_minutes": 0.2})
    here = f"rank 1 on {socket.gethostname()}: no data at 'gone'"
    for said in run_ranks(2, hide_data_from_rank_1, config, timeout_minutes=0.2):
        assert said.startswith(here) and said.endswith("(1)"), "1: a failure of the run"
