"""Documents isolated, and their ends left out of the loss: as in plain torch, on every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from megatron_tokenformer.checkpoint.store import find_checkpoint
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.data.batches import open_blend
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.metrics_file import read_rows
from megatron_tokenformer.model.language_model import LanguageModel, initialize
from megatron_tokenformer.parallel.collectives import TensorParallel
from megatron_tokenformer.training.run import find_eod_id
from megatron_tokenformer.training.schedule import learning_rate
from tests.ranks import run_ranks
from tests.toy import toy_config, train_toy, write_documents

END = 0
BOTH = {"isolate_documents": True, "eod_mask_loss": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("documents")
    write_documents(path, "training", seed=1)
    write_documents(path, "validation", seed=2)
    return path


def configured(folder: Path, data: dict[str, Any], **sections: dict[str, Any]) -> RunConfig:
    """Six steps over short documents, with these options of the data."""
    prefixes = {name[:5]: str(folder / f"{name}_text_document") for name in ("training", "validation")}
    return toy_config(
        folder,
        model={"layers": 4},
        data={"train": prefixes["train"], "validation": prefixes["valid"], **data},
        # As in test_layouts.py: the usual eps makes steps of full size of rounding.  In these short documents
        # 1e-5 still makes 1e-5 of the norm.
        optimizer={"eps": 1e-4},
        training={"steps": 6, "micro_batch_size": 2, **sections.pop("training", {})},
        **sections,
    )


def run(config: RunConfig, name: str, world_size: int = 1) -> list[dict]:
    """Train on this layout; return the metrics rows."""
    config = config.model_copy(update={"run_dir": str(Path(config.run_dir).with_name(name))})
    parallel = config.parallel.model_dump(include={"tensor", "pipeline", "sequence"})
    run_ranks(world_size, train_toy, config, **parallel)
    return read_rows(Path(config.run_dir) / "metrics.jsonl")


def plain_logits(model: LanguageModel, inputs: Tensor, isolate: bool) -> Tensor:
    """[b, s] to [b, s, v]; isolated documents pass through the model one by one, alone."""
    if not isolate:
        return model(inputs).transpose(0, 1)
    rows = []
    for row in inputs:
        lengths = np.diff([0, *(1 + torch.nonzero(row == END).flatten()).tolist(), len(row)]).tolist()
        alone = [model(document[None])[:, 0] for document in row.split([n for n in lengths if n])]
        rows.append(torch.cat(alone))
    return torch.stack(rows)


def plain_loss(model: LanguageModel, config: RunConfig, data: list, start: int, samples: int) -> Tensor:
    """The mean over the positions of these samples that count, all in one batch."""
    blend = open_blend(data, config.data.sequence_length, config.training.seed)
    windows = torch.from_numpy(np.stack([blend[start + i] for i in range(samples)]))
    inputs, targets = windows[:, :-1], windows[:, 1:]
    logits = plain_logits(model, inputs, config.data.isolate_documents)
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return losses[inputs != END].mean() if config.data.eod_mask_loss else losses.mean()


def plain_loop(config: RunConfig) -> list[dict]:
    """Train as anybody would; return rows like those of a run."""
    batch, settings = config.training.global_batch_size, config.optimizer
    model = LanguageModel(config.model)
    initialize(model, config.model, config.training.seed, TensorParallel())
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
    )
    with torch.no_grad():
        samples = config.training.eval_steps * batch
        rows = [{"val_loss": plain_loss(model, config, config.data.validation, 0, samples).item()}]
    for step in range(config.training.steps):
        loss = plain_loss(model, config, config.data.train, step * batch, batch)
        optimizer.zero_grad()
        loss.backward()
        norm = clip_grad_norm_(model.parameters(), settings.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, config.training.steps)
        optimizer.step()
        rows.append({"loss": loss.item(), "grad_norm": norm.item()})
    return rows


@pytest.mark.parametrize("option", [{"isolate_documents": True}, {"eod_mask_loss": True}, BOTH])
def test_losses_are_those_of_a_plain_loop(folder: Path, option: dict[str, bool]) -> None:
    config = configured(folder, option)
    rows, expected = run(config, "-".join(option)), plain_loop(config)
    for here, reference in zip(rows, expected):
        for key, value in reference.items():
            assert here[key] == pytest.approx(value, abs=1e-5), (key, here["step"])
    # Before any step nothing but the sums differs.
    assert rows[0]["val_loss"] == pytest.approx(expected[0]["val_loss"], abs=1e-6)
    assert rows[1]["loss"] == pytest.approx(expected[1]["loss"], abs=1e-6)
    without = plain_loop(configured(folder, {}))
    changes = [abs(row["loss"] - known["loss"]) for row, known in zip(without[1:], expected[1:])]
    assert max(changes) > 1e-4, "an option without effect would be seen"


@pytest.fixture(scope="module")
def one_process(folder: Path) -> list[dict]:
    return run(configured(folder, BOTH), "one")


LAYOUTS = [  # processes, layout, micro-batch
    (1, {}, 8),
    (1, {}, 1),
    (2, {}, 4),
    (2, {}, 1),
    (2, {"tensor": 2, "sequence": True}, 2),
    (2, {"pipeline": 2}, 2),
    (4, {"pipeline": 2}, 2),
    (4, {"tensor": 2, "pipeline": 2, "sequence": True}, 4),
    (4, {"pipeline": 4}, 2),  # positions pass through two stages that read no data
]


@pytest.mark.parametrize("world_size, parallel, size", LAYOUTS)
def test_every_layout_and_micro_batch_size_agrees(
    folder: Path, one_process: list[dict], world_size: int, parallel: dict[str, Any], size: int
) -> None:
    config = configured(folder, BOTH, parallel=parallel, training={"micro_batch_size": size})
    rows = run(config, f"{world_size}-{'-'.join(parallel)}-{size}", world_size)
    assert len(rows) == len(one_process) == 8  # six steps, and an evaluation at either end
    for here, reference in zip(rows, one_process):
        for key in ("loss", "val_loss", "grad_norm"):
            assert here.get(key) == pytest.approx(reference.get(key), abs=1e-5), (key, here["step"])
    assert rows[0]["val_loss"] == pytest.approx(one_process[0]["val_loss"], abs=1e-6)
    assert rows[1]["loss"] == pytest.approx(one_process[1]["loss"], abs=1e-6)


@pytest.mark.parametrize("world_size, parallel", [(1, {}), (2, {"pipeline": 2})])
def test_recomputing_layers_is_bit_identical(folder: Path, world_size: int, parallel: dict[str, int]) -> None:
    found = [
        run(
            configured(folder, BOTH, parallel=parallel, training={"recompute": recompute}),
            f"{recompute}-{world_size}",
            world_size,
        )
        for recompute in ("none", "layer")
    ]
    losses = [[row.get("loss", row.get("val_loss")) for row in rows] for rows in found]
    assert losses[0] == losses[1]


def test_bf16_through_the_pipeline_follows_fp32(folder: Path, one_process: list[dict]) -> None:
    config = configured(folder, BOTH, parallel={"pipeline": 2}, training={"precision": "bf16"})
    for here, reference in zip(run(config, "bf16", 2), one_process):
        key = "loss" if "loss" in here else "val_loss"
        assert here[key] == pytest.approx(reference[key], abs=3e-2)


def test_batches_where_nothing_counts_have_a_loss_of_zero(tmp_path: Path) -> None:
    prefix = write_documents(tmp_path, "empty", documents=1000, longest=1)
    data = {"train": prefix, "validation": prefix, "eod_mask_loss": True}
    rows = run(toy_config(tmp_path, data=data, training={"steps": 2}), "empty", 2)
    assert [row.get("loss", row.get("val_loss")) for row in rows] == [0.0] * 4
    assert [row["grad_norm"] for row in rows if "grad_norm" in row] == [0.0, 0.0]
    assert find_checkpoint(tmp_path / "empty").name == "step-00000002"


def test_the_id_comes_from_all_the_data_when_an_option_needs_it(tmp_path: Path) -> None:
    write_documents(tmp_path, "training", eod_id=2)
    write_documents(tmp_path, "validation", eod_id=3)
    assert find_eod_id(configured(tmp_path, {})) is None
    assert find_eod_id(configured(tmp_path, {"eod_id": 5})) is None
    with pytest.raises(
        UserError, match=r"training_text_document ends .* 2, .*validation_text_document with id 3"
    ):
        find_eod_id(configured(tmp_path, {"isolate_documents": True}))
    assert find_eod_id(configured(tmp_path, {"eod_mask_loss": True, "validation": []})) == 2
    assert find_eod_id(configured(tmp_path, {**BOTH, "eod_id": 5})) == 5
