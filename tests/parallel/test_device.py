"""A GPU that has died is told, and not taken for none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_tokenformer.errors import UserError
from megatron_tokenformer.parallel import device
from megatron_tokenformer.parallel.device import device_kind, take_device
from megatron_tokenformer.parallel.environment import Processes


class Accelerator:
    def device_name(self) -> str:
        return "cuda"


def process(local_rank: int) -> Processes:
    return Processes("srun", local_rank, local_rank, 4, "127.0.0.1", 1)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A host with a CUDA build of torch, and GPUs as files that a test adds; the path of its /dev."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "get_accelerator", Accelerator)
    monkeypatch.setattr(device, "DEVICES", tmp_path)
    return tmp_path


def test_a_host_without_gpus_computes_on_the_cpu(host: Path) -> None:
    (host / "nvidiactl").touch()  # as some containers have, without a GPU
    assert device_kind() == "cpu" and take_device(process(3)) == torch.device("cpu")


@pytest.mark.parametrize("chosen", [None, "DS_ACCELERATOR=cpu", "CUDA_VISIBLE_DEVICES="])
def test_a_gpu_that_does_not_answer_is_no_reason_to_go_on_without(
    host: Path, monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    (host / "nvidia0").touch()
    if chosen is not None:
        monkeypatch.setenv(*chosen.split("="))
        assert take_device(process(0)) == torch.device("cpu")
        return
    with pytest.raises(UserError, match=r"no GPU that works, and this host has \S+/nvidia0; see what nvidia"):
        take_device(process(0))


def test_who_asks_for_a_gpu_by_name_is_told_too(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (host / "nvidia0").touch()
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    with pytest.raises(UserError, match="torch finds no GPU that works"):
        take_device(process(0))


def test_each_process_has_a_gpu_of_its_own(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert device_kind() == "cuda"
    assert take_device(process(1)) == torch.device("cuda", 1) and taken == [1]
    with pytest.raises(UserError, match="local rank 2 has no GPU: this host has 2; start as many"):
        take_device(process(2))
