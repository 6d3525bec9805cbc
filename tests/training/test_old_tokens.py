"""Old tokens frozen or slowed: rows of a parameter train as parameters of their own would, in every layout.

The reference keeps old and new rows in separate parameters of a plain PyTorch loop, in parameter groups of
their own, and joins them in the forward pass.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.nn.utils import clip_grad_norm_

from megatron_tokenformer.checkpoint.manifest import STATES, Interval, read_manifest
from megatron_tokenformer.checkpoint.shards import IntervalReader
from megatron_tokenformer.checkpoint.shrink import carry_out, plan_shrink
from megatron_tokenformer.checkpoint.store import find_checkpoint
from megatron_tokenformer.config.growth import Growth, Shrinking
from megatron_tokenformer.config.schema import Optimizer, RunConfig
from megatron_tokenformer.data.batches import open_blend
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.metrics_file import read_rows
from megatron_tokenformer.model.language_model import LanguageModel
from megatron_tokenformer.model.tau import set_taus, taus_from_json
from megatron_tokenformer.parallel.layout import Layout
from megatron_tokenformer.training.loop import train
from megatron_tokenformer.training.old_tokens import slowed_rows
from megatron_tokenformer.training.schedule import learning_rate
from tests.checkpoint.growing import grow
from tests.ranks import run_ranks
from tests.toy import toy_config, train_toy

SMALL = {"qkv": 16, "output": 16, "ffn": 64}
LARGE = {"qkv": 40, "output": 16, "ffn": 104}  # output tokens do not grow: all of theirs are old
CLIP = 0.2
STEPS = 6
LAYOUTS = {  # processes, layout
    "1": (1, {}),
    "data 2": (2, {}),
    "tensor 2 pipeline 2": (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
    "tensor 4": (4, {"tensor": 4}),
}


def large_config(folder: Path, scale: float, name: str, **sections: Any) -> RunConfig:
    """A stage that starts from the grown checkpoint."""
    config = toy_config(
        folder,
        model={"tokens": LARGE},
        optimizer={"clip_grad": CLIP, "weight_decay": 0.1, "old_token_lr_scale": scale},
        training={"steps": STEPS, "micro_batch_size": 2},
        checkpoint={"load": str(folder / "grown")},
        **sections,
    )
    return config.model_copy(update={"run_dir": str(folder / name)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that was trained for ten steps and then grown."""
    folder = tmp_path_factory.mktemp("old_tokens")
    run_ranks(1, train_toy, toy_config(folder, model={"tokens": SMALL}, training={"micro_batch_size": 4}))
    grow(find_checkpoint(folder / "run"), large_config(folder, 1.0, "none"), folder / "grown", Growth())
    return folder


def state(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Every parameter of a checkpoint, whole: weight and moments."""
    path = find_checkpoint(path)
    manifest = read_manifest(path)
    reader = IntervalReader(path, manifest)

    def read(name: str, kind: str) -> torch.Tensor:
        shape = manifest.shapes[name]
        pieces = reader.read(Interval(name, 0, int(np.prod(shape))), kind)
        return torch.cat([piece for _, piece in pieces]).view(shape)

    return {name: {kind: read(name, kind) for kind in STATES} for name in manifest.shapes}


def rows_before(name: str) -> int | None:
    """Old rows of a K or V; None for other parameters."""
    if not name.endswith("_tokens"):
        return None
    part = name.split(".")[-2]
    return SMALL[part if part in SMALL else "qkv"]


def plain_loop(folder: Path, scale: float) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step of the reference."""
    config = large_config(folder, scale, "none")
    manifest = read_manifest(find_checkpoint(folder / "grown"))
    model = LanguageModel(config.model)
    parts: dict[tuple[str, int], torch.nn.Parameter] = {}
    moments: dict[torch.nn.Parameter, dict[str, torch.Tensor]] = {}
    for name, values in state(folder / "grown").items():
        old = rows_before(name)
        pieces = [slice(0, None)] if old is None else [slice(0, old), slice(old, None)]
        for number, piece in enumerate(pieces):
            parameter = torch.nn.Parameter(values["weight"][piece].clone())
            parts[name, number] = parameter
            moments[parameter] = {
                "step": torch.tensor(float(manifest.adam_step)),
                "exp_avg": values["exp_avg"][piece].clone(),
                "exp_avg_sq": values["exp_avg_sq"][piece].clone(),
            }
    old = [p for (name, number), p in parts.items() if rows_before(name) is not None and number == 0]
    rest = [p for p in parts.values() if all(p is not other for other in old)]
    for parameter in old:
        parameter.requires_grad_(scale > 0)
    settings = config.optimizer
    groups = [{"params": rest, "scale": 1.0}, *([{"params": old, "scale": scale}] if scale else [])]
    adamw = torch.optim.AdamW(groups, betas=settings.betas, eps=settings.eps, weight_decay=0.1)
    for parameter in (*rest, *(old if scale else [])):
        adamw.state[parameter] = moments[parameter]
    blend = open_blend(config.data.train, config.data.sequence_length, config.training.seed)
    batch, found = config.training.global_batch_size, []
    for step in range(STEPS):
        first = manifest.position + step * batch
        set_taus(model, taus_from_json(manifest.taus), step)
        samples = torch.from_numpy(np.stack([blend[first + i] for i in range(batch)]))
        names = {name for name, _ in parts}
        joined = {name: torch.cat([parts[key] for key in sorted(parts) if key[0] == name]) for name in names}
        logits = functional_call(model, joined, (samples[:, :-1],))
        loss = F.cross_entropy(logits.flatten(0, 1), samples[:, 1:].t().flatten())
        adamw.zero_grad()
        loss.backward()
        norm = clip_grad_norm_([p for p in parts.values() if p.requires_grad], CLIP)
        for group in adamw.param_groups:
            group["lr"] = learning_rate(settings, step, STEPS) * group["scale"]
        adamw.step()
        found.append((loss.item(), norm.item()))
    return found


@pytest.fixture(scope="module")
def references(folder: Path) -> dict[float, list[tuple[float, float]]]:
    found = {scale: plain_loop(folder, scale) for scale in (0.0, 0.3, 1.0)}
    assert all(norm > CLIP for rows in found.values() for _, norm in rows), "every step clips"
    for scale in (0.0, 0.3):
        changes = [abs(a - b) for (a, _), (b, _) in zip(found[scale], found[1.0])]
        assert max(changes) > 1e-3, "old tokens that train at the full rate would be seen"
    return found


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_train_as_parameters_of_their_own(
    folder: Path, references: dict[float, list[tuple[float, float]]], layout: str, scale: float
) -> None:
    world_size, parallel = LAYOUTS[layout]
    name = f"{layout} {scale}"
    run_ranks(world_size, train_toy, large_config(folder, scale, name, parallel=parallel), **parallel)
    rows = [row for row in read_rows(folder / name / "metrics.jsonl") if "loss" in row]
    assert len(rows) == STEPS
    for row, (loss, norm) in zip(rows, references[scale]):
        assert row["loss"] == pytest.approx(loss, abs=1e-5), row["step"]
        assert row["grad_norm"] == pytest.approx(norm, abs=1e-5), row["step"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen_rows_keep_every_bit_of_weight_and_moments(folder: Path, precision: str) -> None:
    config = large_config(folder, 0.0, f"frozen {precision}", parallel={"tensor": 2})
    training = config.training.model_copy(update={"precision": precision})
    run_ranks(2, train_toy, config.model_copy(update={"training": training}), tensor=2)
    before, after = state(folder / "grown"), state(folder / f"frozen {precision}")
    for name, values in after.items():
        old = rows_before(name)
        for kind, now in values.items():
            then = before[name][kind]
            assert torch.equal(now[:old], then[:old]) == (old is not None), (name, kind)
            if old is not None and len(now) > old:
                assert not now[old:].eq(then[old:]).all(dim=1).any(), (name, kind)


def test_a_stage_with_slowed_tokens_resumes_bit_for_bit(folder: Path) -> None:
    for name, stops in (("straight", [6]), ("stopped", [3, 6])):
        for steps in stops:
            config = large_config(folder, 0.3, name, parallel={"tensor": 2})
            changes = {
                "training": config.training.model_copy(update={"steps": steps}),
                "optimizer": config.optimizer.model_copy(update={"schedule": "constant"}),
            }
            run_ranks(2, train_toy, config.model_copy(update=changes), tensor=2)
    straight, stopped = (state(folder / name) for name in ("straight", "stopped"))
    for name, values in straight.items():
        for kind in STATES:
            assert torch.equal(values[kind], stopped[name][kind]), (name, kind)


def refusal(layout: Layout, config: RunConfig) -> str:
    with pytest.raises(UserError) as refused:
        train(config, layout)
    return str(refused.value)


def test_a_run_that_has_not_grown_has_no_old_tokens(folder: Path) -> None:
    fresh = toy_config(folder, optimizer={"old_token_lr_scale": 0.0})
    fresh = fresh.model_copy(update={"run_dir": str(folder / "fresh")})
    (told,) = run_ranks(1, refusal, fresh)
    assert "optimizer.old_token_lr_scale=0 is for a run from a checkpoint that has grown" in told
    assert "this run starts anew" in told
    assert not list((folder / "fresh").glob("checkpoints/step-*"))


def test_a_run_that_has_shrunk_since_it_grew_has_no_old_tokens(folder: Path) -> None:
    target = toy_config(folder, model={"tokens": SMALL})
    path, shrunk = carry_out(
        plan_shrink(find_checkpoint(folder / "grown"), target, folder / "shrunk", Shrinking())
    )
    assert [entry["kind"] for entry in shrunk.history] == ["growth", "shrink"]
    with pytest.raises(UserError, match="this run goes on from one that was shrunk since"):
        slowed_rows(Optimizer(old_token_lr_scale=0.5), read_manifest(path))
