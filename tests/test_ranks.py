"""The ranks of the tests themselves."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from megatron_tokenformer.parallel.layout import Layout
from tests.ranks import run_ranks


def where(layout: Layout) -> tuple[str, str, bool, str | None]:
    """On what this rank computes, and why."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return layout.device.type, dist.get_backend(), torch.cuda.is_available(), seen


def test_ranks_are_on_the_cpu_whatever_the_machine_has() -> None:
    assert run_ranks(2, where) == [("cpu", "gloo", False, "")] * 2
