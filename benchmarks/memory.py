"""What one layer keeps for the backward pass, and the most it takes at once, for each training.recompute.

On a CPU the layer runs on tensors without contents, which are allocated and freed like others but take no
memory: every storage is counted once, and while it lives.  On a GPU the allocator is asked.  The parameters
and the layer's input are not counted.  The first peak is that of activations and their gradients (with the
parameters frozen), the second that of training, with the gradients of the parameters.

    python benchmarks/memory.py --tokens 2048
    python benchmarks/memory.py --device cuda --tokens 16384
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from ladder import TOKENS
from reporting import add_device_option, add_json_option, at_least_one, describe, report, settings
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from megatron_tokenformer.config.estimate import POLICIES
from megatron_tokenformer.config.schema import Model, Tokens
from megatron_tokenformer.errors import UserError, run_cli
from megatron_tokenformer.model.tokenformer import TokenformerLayer
from megatron_tokenformer.parallel.collectives import TensorParallel

FIGURES = {"kept": "kept", "peak": "peak", "peak_with_gradients": "peak with gradients of parameters"}
"""of each policy and size, and what the tables call them"""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class LiveStorages(TorchDispatchMode):
    """Bytes of the storages that operations inside have made and nobody has freed yet."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in known}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self.known:
                    self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.bytes())
        return result

    def bytes(self) -> int:
        """At this moment."""
        self.alive = {key: one for key, one in self.alive.items() if not one[0].expired()}
        return sum(size for _, size in self.alive.values())


def run_layer(layer: TokenformerLayer, x: Tensor, policy: str) -> Tensor:
    """The layer's output, from which backward can start."""
    return checkpoint(layer, x, use_reentrant=False) if policy == "layer" else layer(x)


def measure(tokens: int, policy: str, given: argparse.Namespace) -> dict[str, int]:
    """Bytes that a layer of this many tokens keeps, and its peaks over both passes: `FIGURES`."""
    sizes = Tokens(qkv=tokens, output=tokens, ffn=4 * tokens)
    model = Model(hidden_size=given.width, attention_heads=given.width // 64, tokens=sizes)
    torch.set_default_dtype(DTYPES[given.dtype])  # because tensors without contents cannot be cast in place
    with torch.device(given.device):
        layer = TokenformerLayer(model, TensorParallel(), 0, policy == "scores")
        shape = (given.sequence_length, given.tokens // given.sequence_length, given.width)
        x = torch.zeros(shape, requires_grad=True)
        # Makes what is made only once: tables, and on a GPU the workspaces of both passes' threads.
        run_layer(layer, x[:, :1], policy).sum().backward()
        layer.zero_grad(set_to_none=True)
        x.grad = None
        passes = _count_storages if given.device == "cpu" else _ask_allocator
        _, with_gradients = passes(layer, x, policy)
        layer.zero_grad(set_to_none=True)
        x.grad = None
        kept, peak = passes(layer.requires_grad_(False), x, policy)
    return {"kept": kept, "peak": peak, "peak_with_gradients": with_gradients}


def _count_storages(layer: TokenformerLayer, x: Tensor, policy: str) -> tuple[int, int]:
    with LiveStorages([x, *layer.parameters()]) as live:
        output = run_layer(layer, x, policy)
        kept = live.bytes() - output.untyped_storage().nbytes()
        output.backward(torch.zeros_like(output))
    return kept, live.peak


def _ask_allocator(layer: TokenformerLayer, x: Tensor, policy: str) -> tuple[int, int]:
    device = x.device
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    output = run_layer(layer, x, policy)
    kept = torch.cuda.memory_allocated(device) - before - output.untyped_storage().nbytes()
    output.backward(torch.zeros_like(output))
    return kept, torch.cuda.max_memory_allocated(device) - before


def rows(found: dict[str, list[dict[str, int]]], what: str, sizes: list[int]) -> Iterator[str]:
    """A Markdown table of one of `FIGURES`."""
    yield f"| {FIGURES[what]}, MB | " + " | ".join(f"s = {s:,}" for s in sizes) + " | last / first |"
    yield "|---" * (len(sizes) + 2) + "|"
    for policy, figures in found.items():
        own = [figure[what] / 1e6 for figure in figures]
        growth = f"{own[-1] / own[0]:.2f}" if own[0] else "-"
        yield f"| {policy} | " + " | ".join(f"{b:,.1f}" for b in own) + f" | {growth} |"


def main() -> int:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--sizes",
        type=at_least_one,
        nargs="+",
        default=list(TOKENS),
        metavar="S",
        help="tokens of q, k, v, output",
    )
    add("--width", type=at_least_one, default=768, help="d, in heads of 64 (default: 768)")
    add("--tokens", type=at_least_one, default=4096, help="of a micro-batch (default: 4096)")
    add("--sequence-length", type=at_least_one, default=1024)
    add("--dtype", choices=DTYPES, default="bf16")
    add_device_option(parser)
    add_json_option(parser)
    given = parser.parse_args()
    if given.width % 64:
        raise UserError(f"--width {given.width} is not a multiple of 64, the width of a head")
    if given.tokens % given.sequence_length:
        raise UserError(f"--tokens {given.tokens} are no whole sequences of {given.sequence_length}")
    with FakeTensorMode() if given.device == "cpu" else contextlib.nullcontext():
        found = {policy: [measure(size, policy, given) for size in given.sizes] for policy in POLICIES}
    lines = [
        f"one layer, {given.tokens:,} tokens of width {given.width}, {given.dtype}, "
        f"{describe(given.device)['device']}"
    ]
    for what in FIGURES:
        lines += [*rows(found, what, given.sizes), ""]
    report("\n".join(lines), {"settings": settings(given), "results": found}, given.json, given.device)
    return 0


if __name__ == "__main__":
    run_cli(main)
