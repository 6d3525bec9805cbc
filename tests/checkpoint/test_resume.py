"""Resuming: bit for bit on the same layout, from another precision, and from damaged folders."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_tokenformer.checkpoint.manifest import read_manifest
from megatron_tokenformer.checkpoint.store import complete_checkpoints, find_checkpoint
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.metrics_file import read_rows
from megatron_tokenformer.parallel.layout import Layout
from megatron_tokenformer.training.loop import train
from megatron_tokenformer.training.run import find_restore_point
from tests.ranks import run_ranks
from tests.toy import toy_config, train_toy

LAYOUTS = {  # processes, layout; test_grid.py goes from each to others
    "1": (1, {}),
    "data 2": (2, {}),
    "tensor 2 data 2": (4, {"tensor": 2}),
    "pipeline 2 data 2": (4, {"pipeline": 2}),
}


def run(
    folder: Path, name: str, layout: str, steps: int, load: Path | None = None, **training: Any
) -> list[dict]:
    """Train (or go on training) the toy up to `steps` of a ten-step schedule; return its metrics rows."""
    world_size, parallel = LAYOUTS[layout]
    config = toy_config(
        folder,
        parallel=parallel,
        optimizer={"schedule": "constant"},
        training={"micro_batch_size": 2, "steps": steps, **training},
        checkpoint={"load": str(load) if load else None},
    )
    config = config.model_copy(update={"run_dir": str(folder / name)})
    run_ranks(world_size, train_toy, config, **parallel)
    return read_rows(folder / name / "metrics.jsonl")


def losses(rows: list[dict]) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["1", "tensor 2 data 2", "pipeline 2 data 2"])
def test_stop_and_resume_is_bit_identical_to_never_stopping(
    tmp_path: Path, layout: str, precision: str
) -> None:
    straight = run(tmp_path, "straight", layout, 8, precision=precision)
    run(tmp_path, "stopped", layout, 5, precision=precision)
    resumed = run(tmp_path, "stopped", layout, 8, precision=precision)
    assert losses(resumed) == losses(straight)
    assert resumed[-1]["val_loss"] == straight[-1]["val_loss"]
    ends = [find_checkpoint(tmp_path / name) for name in ("straight", "stopped")]
    hashes = [[shard.hash for shard in read_manifest(end).shards] for end in ends]
    assert hashes[0] == hashes[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def reference(folder: Path) -> list[tuple[int, float, float]]:
    return losses(run(folder, "reference", "1", 8))[5:]


def test_fp32_goes_on_from_bf16_and_back(folder: Path, reference: list[tuple[int, float, float]]) -> None:
    """The losses stay with those of fp32 throughout, up to what bf16 rounds off.

    It rounds weights and activations by up to 2^-9 of themselves.  Over the positions of a batch that
    averages out in part, so a loss is off by less than 2^-9 of itself, 0.008 here.
    """
    run(folder, "bf16", "1", 5, precision="bf16")
    rows = run(folder, "bf16 to fp32", "data 2", 6, load=folder / "bf16")
    rows += run(folder, "and back", "1", 8, load=folder / "bf16 to fp32", precision="bf16")
    assert [row[0] for row in losses(rows)] == [6, 7, 8]
    for (_, loss, _), (step, expected, _) in zip(losses(rows), reference):
        assert loss == pytest.approx(expected, rel=2.0**-9), step


@pytest.fixture
def saved(folder: Path, tmp_path: Path) -> Path:
    """A run's folder with two checkpoints, to be damaged."""
    if not (folder / "two").exists():
        config = toy_config(folder, training={"steps": 4}, checkpoint={"interval": 2})
        run_ranks(1, train_toy, config.model_copy(update={"run_dir": str(folder / "two")}))
    shutil.copytree(folder / "two", tmp_path / "two")
    return tmp_path / "two"


def test_a_flipped_byte_is_found_when_hashes_are_read(saved: Path, folder: Path) -> None:
    newest = find_checkpoint(saved)
    (shard,) = newest.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    config = toy_config(folder).model_copy(update={"run_dir": str(saved)})
    verified = {"verify": True, "load": str(newest)}
    verify = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update=verified)})
    assert find_restore_point(config, None) == (newest, read_manifest(newest))
    found = find_restore_point(verify, None)
    assert found is not None and found[0].name == "step-00000002"
    with pytest.raises(UserError, match=f"{shard} is damaged: its hash"):
        find_restore_point(verify.model_copy(update={"run_dir": str(saved / "new")}), None)


@pytest.mark.parametrize("spelling", ["", "checkpoints", "checkpoints/", "link"])
def test_from_a_folder_whose_newest_is_damaged_the_one_before_is_loaded(
    saved: Path, folder: Path, spelling: str, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = find_checkpoint(saved)
    (saved / "link").symlink_to("checkpoints")
    (newest / "rank-00000.safetensors").unlink()
    config = toy_config(folder, checkpoint={"load": f"{saved}/{spelling}"})
    config = config.model_copy(update={"run_dir": str(saved / "new")})
    found = find_restore_point(config, None)
    assert found is not None and found[0].name == "step-00000002" and found[1].step == 2
    assert re.search(r"warning: passing over .*/step-00000004: .* No such file", capsys.readouterr().out)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(saved: Path, folder: Path) -> None:
    for path in complete_checkpoints(saved / "checkpoints"):
        (path / "rank-00000.safetensors").unlink()
    for load in (None, str(folder / "two")):
        config = toy_config(folder, checkpoint={"load": load}).model_copy(update={"run_dir": str(saved)})
        with pytest.raises(UserError, match=r"No such file .*; to start the run anew, remove .*checkpoints"):
            find_restore_point(config, None)


def test_a_checkpoint_of_another_shape_is_refused(saved: Path, folder: Path) -> None:
    config = toy_config(
        folder, model={"tokens": {"qkv": 32, "output": 16, "ffn": 64}}, checkpoint={"load": str(saved)}
    )
    with pytest.raises(
        UserError, match=r"query.key_tokens of shape \[16, 32\], the config's model has \[32, 32\]"
    ):
        find_restore_point(config.model_copy(update={"run_dir": str(saved / "new")}), None)


def test_only_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    config = toy_config(tmp_path, training={"steps": 4}, checkpoint={"interval": 1, "keep_last": 2})
    run_ranks(1, train_toy, config)
    kept = complete_checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name for path in kept] == ["step-00000003", "step-00000004"]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-00000004\n"


def save_into_a_file(layout: Layout, config: RunConfig) -> str:
    try:
        train(config, layout)
    except UserError as error:
        return str(error)
    return "saved"


def test_a_save_that_one_rank_cannot_write_fails_on_all_in_words(tmp_path: Path) -> None:
    config = toy_config(tmp_path, training={"steps": 2, "micro_batch_size": 2})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("in the way")
    for said in run_ranks(2, save_into_a_file, config):
        assert "checkpoint of step 2 not written: rank 0 on " in said
