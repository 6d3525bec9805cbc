"""Operations against torch's own counter, on the models of all configs; peaks by the names devices have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_tokenformer.config.load import load_config
from megatron_tokenformer.config.sizes import device_peak, flops_per_token, layer_forward_flops
from megatron_tokenformer.config.stages import layer_work
from megatron_tokenformer.model.language_model import LanguageModel

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_operations_are_those_of_the_products(path: Path) -> None:
    """On shapes alone, where attention's two products, and four in backward, are counted as whole squares."""
    config = load_config(path)
    model, length = config.model, config.data.sequence_length
    with torch.device("meta"):
        network = LanguageModel(model)
        tokens = torch.zeros(1, length, dtype=torch.long)
    with FlopCounterMode(display=False) as forward:
        logits = network(tokens)
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    squares = model.layers * 2 * 2 * length**2 * model.hidden_size
    assert 3 * (forward.get_total_flops() - squares // 2) == length * flops_per_token(model, length)
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


def test_what_recomputing_adds() -> None:
    """A forward pass, or of the products of parameter tokens one of six."""
    config = load_config(CONFIGS[0])
    forward = layer_forward_flops(config.model, 0)
    none, scores, layer = (layer_work(config.model, 0, policy) for policy in ("none", "scores", "layer"))
    assert (none, scores, layer) == (3 * forward, 3 * forward * 7 // 6, 4 * forward)


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("A100-SXM4-40GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA GH200 144G HBM3e", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A10", 125),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD Instinct MI300X", 1307.4),
        ("AMD Instinct MI250X", 191.5),
    ],
)
def test_known_devices(name: str, tflops: float) -> None:
    assert device_peak(name) == device_peak(name, "fp16") == tflops * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "Riva TNT2",
        "",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "NVIDIA A100X",
        "NVIDIA GB200",
        "NVIDIA B200A",
        "NVIDIA H20",
        "NVIDIA L40",
        "NVIDIA A10G",
        "NVIDIA A16",
        "NVIDIA RTX 6000 Ada Generation",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "AMD Instinct MI250X / MI250",
        "AMD Instinct MI210",
    ],
)
def test_an_unknown_device_has_no_peak(name: str) -> None:
    assert device_peak(name) is None and device_peak(name, "fp16") is None


def test_a_v100_computes_in_fp16_only() -> None:
    for name, tflops in {"Tesla V100-SXM2-16GB": 125, "Tesla V100-PCIE-32GB": 112}.items():
        assert device_peak(name) is None
        assert device_peak(name, "fp16") == tflops * 1e12
