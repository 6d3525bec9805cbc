"""Saves in the background: what training may do meanwhile, and what happens when they fail."""

from __future__ import annotations

import os
import resource
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_tokenformer.checkpoint.engine_state import Fragment
from megatron_tokenformer.checkpoint.manifest import STATES, Interval, read_manifest
from megatron_tokenformer.checkpoint.shards import BLOCK_ELEMENTS, IntervalReader
from megatron_tokenformer.checkpoint.store import complete_checkpoints, find_checkpoint
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.parallel.layout import Layout
from megatron_tokenformer.training.loop import train
from tests.checkpoint.saves import TENSORS, WIDTH, fill, manifest, open_saver, state, stored_value
from tests.ranks import run_ranks
from tests.toy import toy_config

LARGE = BLOCK_ELEMENTS * 3 // 4
"""elements of a tensor whose three states lie in three blocks, two of them across a border"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def change_while_saving(layout: Layout, folder: Path) -> None:
    held = state(layout, 1.0)
    with open_saver(layout, folder, print) as saver:
        if layout.rank == 1:
            dist.barrier()  # rank 0 has started its save, which cannot write before rank 1 takes part
        saver.start(manifest(layout, 1), held)
        if layout.rank == 0:
            fill(held, 2.0)
            dist.barrier()


def test_a_checkpoint_is_of_its_moment_however_training_goes_on(tmp_path: Path) -> None:
    run_ranks(2, change_while_saving, tmp_path)
    assert stored_value(find_checkpoint(tmp_path)) == 1.0
    assert names(tmp_path) == ["latest", "step-00000001"]


def save_large(layout: Layout, folder: Path) -> None:
    values = {key: torch.arange(LARGE) + number * LARGE for number, key in enumerate(STATES)}
    held = Fragment(
        Interval("large", 0, LARGE),
        {key: value.float() for key, value in values.items()},
        offset=0,
        owned=True,
    )
    with open_saver(layout, folder, print) as saver:
        for step in (1, 2):
            saver.start(replace(manifest(layout, step), shapes={"large": [LARGE]}), [held])


def test_a_state_of_several_blocks_is_stored_element_for_element(tmp_path: Path) -> None:
    run_ranks(1, save_large, tmp_path)
    for path in complete_checkpoints(tmp_path):
        reader = IntervalReader(path, read_manifest(path))
        for number, key in enumerate(STATES):
            pieces = [values for _, values in reader.read(Interval("large", 0, LARGE), key)]
            assert torch.equal(torch.cat(pieces), (torch.arange(LARGE) + number * LARGE).float())


def save_and_look(layout: Layout, folder: Path, asynchronous: bool, last: bool) -> list[str]:
    with open_saver(layout, folder, print, asynchronous=asynchronous) as saver:
        saver.start(manifest(layout, 1), state(layout), last)
        return names(folder)


@pytest.mark.parametrize(("asynchronous", "last"), [(False, False), (True, True)])
def test_a_synchronous_save_and_the_last_one_are_done_when_they_return(
    tmp_path: Path, asynchronous: bool, last: bool
) -> None:
    assert run_ranks(1, save_and_look, tmp_path, asynchronous, last) == [["latest", "step-00000001"]]


def interrupt(layout: Layout, folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt), open_saver(layout, folder, print) as saver:
        for step in (1, 2):
            saver.start(manifest(layout, step), state(layout, step))
        raise KeyboardInterrupt


def test_who_leaves_waits_for_the_save_in_flight(tmp_path: Path) -> None:
    run_ranks(2, interrupt, tmp_path)
    assert [stored_value(path) for path in complete_checkpoints(tmp_path)] == [1.0, 2.0]


def save_on_rank_0_alone(layout: Layout, folder: Path) -> None:
    with open_saver(layout, folder, print) as saver:
        there = replace(manifest(layout, 1), shapes={name: [1, WIDTH] for name in TENSORS})
        saver.start(there, state(layout, 1.0) if layout.is_main else [])


def test_a_rank_that_owns_nothing_takes_part(tmp_path: Path) -> None:
    run_ranks(2, save_on_rank_0_alone, tmp_path)
    assert stored_value(tmp_path / "step-00000001") == 1.0
    assert names(tmp_path / "step-00000001") == ["manifest.json", "rank-00000.safetensors"]


def fail_and_recover(layout: Layout, folder: Path) -> list[str]:
    said: list[str] = []
    with open_saver(layout, folder, said.append) as saver:
        saver.start(manifest(layout, 1), state(layout, 1.0))
        saver.wait()
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        for step in (2, 3):
            if layout.rank == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
            saver.start(manifest(layout, step), state(layout, step))
            saver.wait()
            assert layout.rank == 1 or names(folder) == ["latest", "step-00000001"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        for step in (4, 5, 6):
            saver.start(manifest(layout, step), state(layout, step))
    return said


def test_a_rank_that_cannot_write_is_named_and_training_goes_on_until_it_can(tmp_path: Path) -> None:
    for said in run_ranks(2, fail_and_recover, tmp_path):
        assert said[0].startswith(f"saved {tmp_path}/step-00000001 in ")
        for line, step in zip(said[1:3], (2, 3)):
            assert line.startswith(f"warning: checkpoint of step {step} not written: rank 1 on ")
            assert f"{tmp_path}/.step-0000000{step}.writing/rank-00001.safetensors File too large" in line
            assert line.endswith(f"training goes on (failure {step - 1} of at most 3 in a row)")
        assert [line.split(" in ")[0] for line in said[3:]] == [
            f"saved {tmp_path}/step-0000000{step}" for step in (4, 5, 6)
        ]
    assert [stored_value(path) for path in complete_checkpoints(tmp_path)] == [5.0, 6.0]


def damage_after_writing(layout: Layout, folder: Path) -> list[str]:
    def flip(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and arguments[1] == "r" and str(arguments[0]).endswith("rank-00000.safetensors"):
            descriptor = os.open(arguments[0], os.O_WRONLY)
            os.pwrite(descriptor, b"\xff", 5000)
            os.close(descriptor)

    sys.addaudithook(flip)  # it stays until this process ends
    return fail_last(layout, folder)


def fail_last(layout: Layout, folder: Path) -> list[str]:
    said: list[str] = []
    with pytest.raises(UserError) as failed, open_saver(layout, folder, said.append) as saver:
        saver.start(manifest(layout, 1), state(layout, 1.0), last=True)
    return [*said, f"{failed.value} ({failed.value.exit_code})"]


def test_a_shard_that_does_not_read_back_as_it_was_written_is_not_published(tmp_path: Path) -> None:
    (said,) = run_ranks(1, damage_after_writing, tmp_path)
    assert len(said) == 1 and said[0].startswith("checkpoint of step 1 not written: rank 0 on ")
    assert said[0].endswith("is damaged: its hash is not the manifest's (1)")
    assert names(tmp_path) == []


def train_with_a_file_in_the_way(layout: Layout, config: RunConfig) -> str:
    with pytest.raises(UserError) as failed:
        train(config, layout)
    return f"{failed.value} ({failed.value.exit_code})"


def test_a_run_whose_saves_keep_failing_ends_in_words(tmp_path: Path) -> None:
    config = toy_config(tmp_path, checkpoint={"interval": 2, "max_failures": 3})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("in the way")
    (said,) = run_ranks(1, train_with_a_file_in_the_way, config)
    assert said.startswith("checkpoint of step 6 not written: rank 0 on ")
    assert said.endswith("; 3 saves in a row have failed (1)")
    assert not (tmp_path / "run" / "finished.json").exists()
