"""Which processor this process computes on, and that a GPU which has died is not taken for none."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator

from megatron_tokenformer.errors import UserError
from megatron_tokenformer.parallel.environment import Processes

DEVICES = Path("/dev")


def device_kind() -> str:
    """`cuda`, or `cpu` if there is no GPU that works or DS_ACCELERATOR=cpu says so."""
    found = get_accelerator().device_name() != "cpu" and torch.cuda.is_available()
    return "cuda" if found else "cpu"


def take_device(processes: Processes) -> torch.device:
    """This process's GPU, or the CPU where there is none.

    Raises:
        UserError: more processes than GPUs on this host, or its GPUs do not work.
    """
    if device_kind() == "cpu":
        _refuse_a_lost_gpu()
        return torch.device("cpu")
    if processes.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {processes.local_rank} has no GPU: this host has {torch.cuda.device_count()}; "
            f"start as many processes on it as it has GPUs, or export DS_ACCELERATOR=cpu to use none",
            exit_code=1,
        )
    torch.cuda.set_device(processes.local_rank)
    return torch.device("cuda", processes.local_rank)


def _refuse_a_lost_gpu() -> None:
    """A run that is started again after its GPU has failed would go on, for ever, on the CPU."""
    on_purpose = os.environ.get("DS_ACCELERATOR") == "cpu"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    there = sorted(DEVICES.glob("nvidia[0-9]*"))
    if torch.version.cuda is not None and there and not (on_purpose or hidden):
        raise UserError(
            f"torch finds no GPU that works, and this host has {there[0]}; see what nvidia-smi says, or "
            f"export DS_ACCELERATOR=cpu to train on the CPU",
            exit_code=1,
        )
