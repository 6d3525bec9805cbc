"""The engine computes what a plain PyTorch loop computes: losses and gradient norms within 1e-5, in fp32.

The loop has no DeepSpeed, no pipeline, no accumulation, no ZeRO and no fused optimizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.data.batches import open_blend
from megatron_tokenformer.metrics_file import read_rows
from megatron_tokenformer.model.language_model import LanguageModel, initialize
from megatron_tokenformer.parallel.collectives import TensorParallel
from megatron_tokenformer.training.schedule import learning_rate
from tests.ranks import run_ranks
from tests.toy import DENSE, toy_config, train_toy

CLIP = 0.2
DECAY = 0.1


def plain_loop(config: RunConfig, clip: float = CLIP, decay: float = DECAY) -> list[tuple[float, float]]:
    """Train as anybody would; return each step's loss and its gradient norm before clipping."""
    batch, steps, settings = config.training.global_batch_size, config.training.steps, config.optimizer
    model = LanguageModel(config.model)
    initialize(model, config.model, config.training.seed, TensorParallel())
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=settings.betas, eps=settings.eps, weight_decay=decay, fused=False
    )
    blend = open_blend(config.data.train, config.data.sequence_length, config.training.seed)
    found = []
    for step in range(steps):
        samples = torch.from_numpy(np.stack([blend[step * batch + i] for i in range(batch)]))
        logits = model(samples[:, :-1])  # [s, b, v]
        loss = F.cross_entropy(logits.flatten(0, 1), samples[:, 1:].t().flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = clip_grad_norm_(model.parameters(), clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, steps)
        optimizer.step()
        found.append((loss.item(), norm.item()))
    return found


@pytest.mark.parametrize("model", [{}, DENSE], ids=["tokenformer", "transformer"])
def test_losses_and_norms_are_those_of_a_plain_loop(tmp_path: Path, model: dict[str, Any]) -> None:
    config = toy_config(
        tmp_path,
        model=model,
        optimizer={"clip_grad": CLIP, "weight_decay": DECAY},
        training={"micro_batch_size": 2},  # accumulation 4
    )
    expected = plain_loop(config)
    run_ranks(1, train_toy, config)
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 11))
    for row, (loss, norm) in zip(rows, expected):
        assert norm > CLIP, "every step clips"
        assert row["loss"] == pytest.approx(loss, abs=1e-5), row["step"]
        assert row["grad_norm"] == pytest.approx(norm, abs=1e-5), row["step"]
    for other in (plain_loop(config, clip=1e9), plain_loop(config, decay=0.0)):
        changes = [abs(loss - known) for (loss, _), (known, _) in zip(other, expected)]
        assert max(changes) > 5e-5, "a mistake in clipping or decay would be seen"
