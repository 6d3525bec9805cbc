"""Operations against torch's own counter, on the models of all configs; peaks by the names devices have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_tokenformer.config.load import load_config
from megatron_tokenformer.config.pipeline_cut import layer_work
from megatron_tokenformer.config.sizes import device_peak, flops_per_token, layer_forward_flops
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
    """A forward pass; or of six products of parameter tokens one, or four where chunks wait for ranks."""
    path = Path(__file__).parents[2] / "configs/tokenformer-1.4b.yaml"

    def work(recompute: str, tensor: int = 1, micro_batch: int = 1) -> int:
        training = {"recompute": recompute, "micro_batch_size": micro_batch, "global_batch_size": micro_batch}
        words = [f"training.{key}={value}" for key, value in training.items()]
        return layer_work(load_config(path, [*words, f"parallel.tensor={tensor}"]))

    model = load_config(path).model
    forward = layer_forward_flops(model, 1024)
    product = 2 * model.hidden_size * 9216
    assert (work("none"), work("layer")) == (3 * forward, 4 * forward)
    assert work("scores") == work("scores", micro_batch=64) == 3 * forward + 8 * product
    assert work("scores", tensor=2) == 3 * forward + 8 * product
    # A chunk has 2^25 scores: 1,820 rows of 18,432 scores or 7,281 of 4,608, so of 4,096 rows not the FFN's.
    assert work("scores", tensor=2, micro_batch=4) == 3 * forward + (4 + 4 * 4) * product


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
    assert device_peak(name, "fp32") is None


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
