"""The first loss after a load is that of the run that saved, or the run stops."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_tokenformer.checkpoint.store import complete_checkpoints
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.metrics_file import read_rows
from megatron_tokenformer.parallel.layout import Layout
from megatron_tokenformer.training.continuity import NEXT_LOSS, Continuity
from megatron_tokenformer.training.loop import train
from tests.ranks import run_ranks
from tests.toy import toy_config, write_tokens


def configured(folder: Path, data: str, steps: int, **sections: Any) -> RunConfig:
    return toy_config(
        folder,
        **{
            "data": {"train": data, "validation": data},
            "optimizer": {"schedule": "constant"},
            "training": {"micro_batch_size": 2, "steps": steps},
            "checkpoint": {"interval": 2, "keep_last": 9},
            **sections,
        },
    )


def outcome(layout: Layout, config: RunConfig) -> str:
    """Train; return the mistake, or nothing."""
    try:
        train(config, layout)
    except UserError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of seven steps that saved at 2, 4, 6 and 7; what comes after 4 is then removed."""
    folder = tmp_path_factory.mktemp("trained")
    assert run_ranks(1, outcome, configured(folder, write_tokens(folder), 7)) == [""]
    return folder


def data_of(folder: Path) -> str:
    return str(folder / "toy_text_document")


def copy(trained: Path, tmp_path: Path) -> Path:
    """The run as it was when it had saved its fourth step; it reads the same data."""
    shutil.copytree(trained / "run", tmp_path / "run")
    for path in complete_checkpoints(tmp_path / "run/checkpoints"):
        if path.name > "step-00000004":
            shutil.rmtree(path)
    return tmp_path


def damage(folder: Path) -> None:
    """Move all weights on by one place, and nothing else."""
    (path,) = (folder / "run/checkpoints/step-00000004").glob("*.safetensors")
    content = bytearray(path.read_bytes())
    data_at = 8 + int.from_bytes(content[:8], "little")
    for name, entry in json.loads(content[8:data_at]).items():
        start, stop = (data_at + offset for offset in entry["data_offsets"])
        if "/weight/" in name:
            content[start:stop] = np.roll(np.frombuffer(content[start:stop], np.float32), 1).tobytes()
    path.write_bytes(content)


def test_the_loss_after_each_save_but_the_last_is_kept_beside_it(trained: Path) -> None:
    rows = read_rows(trained / "run/metrics.jsonl")
    by_step = {row["step"]: row["loss"] for row in rows if "loss" in row}
    for path in complete_checkpoints(trained / "run/checkpoints"):
        step = int(path.name.removeprefix("step-"))
        if step == 7:
            assert not (path / NEXT_LOSS).exists()
        else:
            assert json.loads((path / NEXT_LOSS).read_text())["loss"] == pytest.approx(by_step[step + 1])


@pytest.mark.parametrize("layout", [(1, {}), (2, {"tensor": 2, "sequence": True}), (2, {"pipeline": 2})])
def test_a_resumed_run_is_compared_and_goes_on(
    trained: Path, tmp_path: Path, layout: tuple[int, dict[str, Any]]
) -> None:
    world_size, parallel = layout
    folder = copy(trained, tmp_path)
    config = configured(folder, data_of(trained), 6, parallel=parallel)
    assert run_ranks(world_size, outcome, config, **parallel) == [""] * world_size


def test_changed_weights_stop_every_rank_and_nothing_is_saved(trained: Path, tmp_path: Path) -> None:
    folder = copy(trained, tmp_path)
    damage(folder)
    said = run_ranks(2, outcome, configured(folder, data_of(trained), 6))
    assert all("the first loss after loading" in words and "step-00000004" in words for words in said)
    assert [path.name for path in complete_checkpoints(folder / "run/checkpoints")][-1] == "step-00000004"
    relaxed = {"interval": 0, "check_loss": False}
    assert run_ranks(1, outcome, configured(folder, data_of(trained), 6, checkpoint=relaxed)) == [""]


def test_other_samples_are_not_compared(trained: Path, tmp_path: Path) -> None:
    folder = copy(trained, tmp_path)
    damage(folder)
    training = {"micro_batch_size": 2, "steps": 5, "seed": 99}
    assert run_ranks(1, outcome, configured(folder, data_of(trained), 5, training=training)) == [""]


def test_a_damaged_record_is_named(trained: Path, tmp_path: Path) -> None:
    folder = copy(trained, tmp_path)
    path = folder / "run/checkpoints/step-00000004" / NEXT_LOSS
    for content in ("", "[]", '{"loss": "x"}', '{"loss": NaN, "precision": "fp32", "samples": {}}'):
        path.write_text(content)
        (said,) = run_ranks(1, outcome, configured(folder, data_of(trained), 6))
        assert f"{path} is damaged; remove it" in said


def losses_beside_a_checkpoint(layout: Layout, folder: Path) -> list[bool]:
    """Whether step 2 has a next loss: in an old folder of that step, in the new one, and then in the old."""
    config, step = toy_config(folder), folder / "step-00000002"
    continuity = Continuity(config, layout, folder, "fp32", None, 0)
    step.mkdir()
    continuity.saved(2)
    continuity.stepped(3, 24, torch.tensor(1.0))
    found = [(step / NEXT_LOSS).exists()]
    step.rename(folder / "old")
    step.mkdir()
    continuity.write()
    return [*found, (step / NEXT_LOSS).exists(), (folder / "old" / NEXT_LOSS).exists()]


def test_a_loss_goes_to_the_checkpoint_that_it_is_of_not_to_one_that_is_replaced(tmp_path: Path) -> None:
    assert run_ranks(1, losses_beside_a_checkpoint, tmp_path) == [[False, True, False]]


def diverged(layout: Layout, folder: Path) -> bool:
    continuity = Continuity(toy_config(folder), layout, folder, "fp32", None, 0)
    continuity.saved(2)
    (folder / "step-00000002").mkdir()
    continuity.stepped(3, 24, torch.tensor(float("nan")))
    return (folder / "step-00000002" / NEXT_LOSS).exists()


def test_a_loss_that_is_no_number_is_not_kept_for_comparison(tmp_path: Path) -> None:
    assert run_ranks(1, diverged, tmp_path) == [False]


def first_loss(layout: Layout, folder: Path, loss: float, micro_batch_size: int) -> str:
    """Load a checkpoint whose run, in bf16, had 2.0 next; what the first loss here is answered with."""
    config = toy_config(folder, training={"micro_batch_size": micro_batch_size})
    before = Continuity(toy_config(folder), layout, folder, "bf16", None, 0)
    before.saved(2)
    path = folder / "step-00000002"
    path.mkdir()
    before.stepped(3, 24, torch.tensor(2.0))
    try:
        Continuity(config, layout, folder, "bf16", path, 16).stepped(3, 24, torch.tensor(loss))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "loss, micro_batch_size, refused",
    [(2.001, 1, False), (2.01, 1, True), (2.01, 2, False), (2.2, 2, True)],
)
def test_in_16_bits_rounding_is_allowed_for_only_where_it_can_differ(
    tmp_path: Path, loss: float, micro_batch_size: int, refused: bool
) -> None:
    (said,) = run_ranks(1, first_loss, tmp_path, loss, micro_batch_size)
    assert ("the first loss after loading" in said) == refused
