"""Pattention: against ten lines written here, alone in somebody's model, and split over ranks."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from megatron_tokenformer.config.schema import ScoreNorm
from megatron_tokenformer.model.pattention import Pattention
from megatron_tokenformer.parallel.collectives import TensorParallel
from megatron_tokenformer.parallel.layout import Layout
from tests.ranks import run_ranks


def reference(x: Tensor, keys: Tensor, values: Tensor, tau: float, kind: str) -> Tensor:
    """Pattention(X; K, V) = S V."""
    a = x @ keys.T
    gelu = nn.functional.gelu
    if kind == "l2_norm_gelu":
        s = gelu(tau * a / a.square().sum(-1, keepdim=True).sqrt())
    elif kind == "gelu_l2_norm":
        s = tau * gelu(a) / gelu(a).square().sum(-1, keepdim=True).sqrt()
    else:
        s = tau**2 * torch.softmax(a, -1)
    return s @ values


def example(kind: str, seed: int = 0) -> tuple[Pattention, Tensor]:
    torch.manual_seed(seed)
    layer = Pattention(12, 10, 24, kind)
    layer.reset_parameters(key_std=0.5, value_std=0.5)
    return layer.double(), torch.randn(5, 3, 12, dtype=torch.float64)


@pytest.mark.parametrize("kind", get_args(ScoreNorm))
def test_equals_the_reference_forward_and_backward(kind: str) -> None:
    layer, x = example(kind)
    x.requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    copies = [t.detach().clone().requires_grad_() for t in (x, layer.key_tokens, layer.value_tokens)]
    expected = reference(*copies, math.sqrt(24), kind)
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    for here, there in zip((x, layer.key_tokens, layer.value_tokens), copies):
        torch.testing.assert_close(here.grad, there.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", get_args(ScoreNorm))
def test_gradcheck_in_float64(kind: str) -> None:
    layer, x = example(kind)
    x = x[:2].requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, layer.key_tokens, layer.value_tokens))


@pytest.mark.parametrize("kind", ["l2_norm_gelu", "gelu_l2_norm"])
def test_zero_keys_with_kept_tau_leave_the_function_and_learn(kind: str) -> None:
    layer, x = example(kind)
    grown = Pattention(12, 10, 40, kind).double()
    with torch.no_grad():
        grown.key_tokens.zero_()
        grown.key_tokens[:24], grown.value_tokens[:24] = layer.key_tokens, layer.value_tokens
    grown.tau = layer.tau
    torch.testing.assert_close(grown(x), layer(x), rtol=1e-12, atol=1e-12)
    grown(x).sum().backward()
    assert grown.key_tokens.grad is not None and grown.key_tokens.grad[24:].abs().amin(dim=1).gt(0).all()
    grown.tau = math.sqrt(40)
    assert (grown(x) - layer(x)).abs().max() > 1e-2  # which is why tau is kept


def test_tau_travels_in_the_state_dict(tmp_path: Path) -> None:
    layer, x = example("l2_norm_gelu")
    layer.tau = 3.25
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other, _ = example("l2_norm_gelu", seed=1)
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert other.tau == 3.25
    assert torch.equal(other(x), layer(x))


def test_works_alone_with_no_framework() -> None:
    program = (
        "import torch, sys\n"
        "from megatron_tokenformer.model.pattention import Pattention\n"
        "layer = torch.nn.Sequential(Pattention(8, 16, 32), Pattention(16, 4, 8, 'softmax'))\n"
        "layer(torch.randn(2, 8)).sum().backward()\n"
        "assert not {'deepspeed', 'megatron'} & set(sys.modules), 'a framework was imported'\n"
        "assert not torch.distributed.is_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def split_step(layout: Layout, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, the input's gradient, and the parameters after one Adam step, gathered by the caller."""
    whole, x = example(kind)
    layer = Pattention(12, 10, 24, kind, layout.tensor).double()
    rows = layout.tensor.rows(24)
    with torch.no_grad():
        layer.key_tokens.copy_(whole.key_tokens[rows.start : rows.stop])
        layer.value_tokens.copy_(whole.value_tokens[rows.start : rows.stop])
    x.requires_grad_()
    adam = torch.optim.Adam(layer.parameters(), lr=0.1)
    y = layer(x)
    y.square().sum().backward()
    adam.step()
    return y.detach(), x.grad, layer.key_tokens.detach(), layer.value_tokens.detach()


@pytest.mark.parametrize("kind", get_args(ScoreNorm))
@pytest.mark.parametrize("tensor", [2, 4])
def test_split_over_ranks_equals_whole(kind: str, tensor: int) -> None:
    ((y, dx, keys, values),) = run_ranks(1, split_step, kind)
    parts = run_ranks(tensor, split_step, kind, tensor=tensor)
    for part_y, part_dx, _, _ in parts:
        torch.testing.assert_close(part_y, y, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(part_dx, dx, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.cat([p[2] for p in parts]), keys, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.cat([p[3] for p in parts]), values, rtol=1e-10, atol=1e-10)


def test_tokens_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="25 parameter tokens cannot be split over 2 ranks"):
        Pattention(4, 4, 25, ranks=TensorParallel(size=2))
