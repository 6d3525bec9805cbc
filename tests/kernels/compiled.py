"""Compile the kernels, as their launches ask, for a GPU that need not be here; print what came of it.

    python -m tests.kernels.compiled sm_90:l2_norm_gelu:bfloat16:36864:whole gfx942:softmax:float32:576:split

Triton brings the compilers of both makers.  It asks its driver for the GPU, so here a driver answers that is
nothing but that answer, and a kernel's launch ends where Triton would load what it has compiled.  The
launches are those of `triton_kernels`, called as the model calls it.  Prints one JSON list.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import tempfile
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ.update(TRITON_ALWAYS_COMPILE="1", TRITON_DUMP_PTXAS_LOG="1")

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from megatron_tokenformer.kernels import triton_kernels

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS = {name: getattr(triton_kernels, name) for name in ("_forward_kernel", "_backward_kernel")}


class Target:
    """A driver as far as compiling goes."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


class Compiled:
    """In a kernel's place: compiles for what it is launched with, and notes what came of it."""

    def __init__(self, name: str, found: list[dict[str, Any]]) -> None:
        self.name, self.kernel, self.found = name, KERNELS[name], found

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            log = io.StringIO()
            with contextlib.redirect_stdout(log):
                done = self.kernel.run(*arguments, grid=grid, warmup=True, **options)
            result = {"kernel": self.name, **options, **read(done, log.getvalue())}
            if "ptx" in done.asm and options["N"] % options["BLOCK"] == 0:
                # Masks of PTX say nothing: the next compiler drops those that are always true.
                result["instructions"] = re.findall(r"(?:@\S+ )?(?:LDG|STG)\S*", done.asm["sass"])
            self.found.append(result)

        return launch


def read(done: Any, log: str) -> dict[str, Any]:
    """Registers of a thread, bytes that spill, and accesses to global memory."""
    if "ptx" in done.asm:
        return {
            "registers": int(re.findall(r"Used (\d+) registers", log)[0]),
            "spilled": sum(int(size) for size in re.findall(r"(\d+) bytes (?:spill|stack)", log)),
            "accesses": re.findall(r"(?:ld|st)\.global[\w.:]*", done.asm["ptx"]),
        }
    assembly = done.asm["amdgcn"]
    spilled = re.findall(r"(?:spill_count|private_segment_fixed_size): +(\d+)", assembly)
    return {
        "registers": int(re.findall(r"\.vgpr_count: +(\d+)", assembly)[0]),
        "spilled": sum(int(size) for size in spilled),
        "accesses": re.findall(r"\b(?:global|buffer)_(?:load|store)_\w+", assembly),
    }


def compile_case(case: str) -> list[dict[str, Any]]:
    """`target:kind:dtype:n:whole` (two launches), or `...:split` (four, as where a row is over ranks)."""
    target, kind, dtype, n, how = case.split(":")
    found: list[dict[str, Any]] = []
    driver.set_active(Target(TARGETS[target]))
    triton_kernels.WARP_SIZE = TARGETS[target].warp_size
    for name, kernel in KERNELS.items():
        kernel.device_caches.clear()
        setattr(triton_kernels, name, Compiled(name, found))
    scores, grad = torch.zeros(2, 2, int(n), dtype=getattr(torch, dtype))
    if how == "whole":
        _, stats = triton_kernels.weights(scores, 1.0, kind)
        triton_kernels.gradients_(scores, grad, 1.0, kind, stats)
    else:
        stats = triton_kernels.row_stats(scores, kind)
        triton_kernels.weights(scores, 1.0, kind, stats)
        sums = triton_kernels.row_sums(scores, grad, 1.0, kind, stats)
        triton_kernels.gradients_(scores, grad, 1.0, kind, stats, sums)
    return [{"case": case, **one} for one in found]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as os.environ["TRITON_CACHE_DIR"]:
        print(json.dumps([one for case in sys.argv[1:] for one in compile_case(case)]))
