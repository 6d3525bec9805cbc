"""The Triton kernels become code of GPUs, as they are launched, on a machine that need not have one.

What the code computes is for `test_score_norm.py`; how fast it is, for a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_tokenformer.kernels import triton_kernels

ROOT = Path(__file__).resolve().parents[2]
CASES = [
    "sm_90:l2_norm_gelu:bfloat16:36864:whole",  # the FFN of 1.4B
    "sm_90:l2_norm_gelu:bfloat16:536:whole",  # 2,144 over 4 ranks: no multiple of 16, which Triton looks for
    "sm_90:gelu_l2_norm:bfloat16:4096:whole",  # blocks fit
    "sm_90:softmax:float32:2304:split",
    "sm_90:l2_norm_gelu:float32:1:whole",
    "sm_80:softmax:float16:19456:whole",
    "gfx942:gelu_l2_norm:bfloat16:36864:whole",
]
"""other cases are compiled by hand: see `compiled.py`"""


@pytest.fixture(scope="module")
def kernels() -> dict[str, list[dict[str, Any]]]:
    """What came of each case's kernels."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiled", *CASES],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "FP_FUSION" not in done.stderr, "the launch leaves open what Triton 3.9 wants to know"
    found: dict[str, list[dict[str, Any]]] = {case: [] for case in CASES}
    for one in json.loads(done.stdout):
        found[one["case"]].append(one)
    return found


@pytest.mark.parametrize("case", CASES)
def test_every_launch_compiles_and_nothing_spills(
    kernels: dict[str, list[dict[str, Any]]], case: str
) -> None:
    target, kind, _, n, how = case.split(":")
    launches = [(one["kernel"], one["SUMS"], one["WRITES"]) for one in kernels[case]]
    forward, backward = "_forward_kernel", "_backward_kernel"
    halves = [(kernel, half, not half) for kernel in (forward, backward) for half in (True, False)]
    assert launches == (halves if how == "split" else [(forward, True, True), (backward, True, True)])
    for one in kernels[case]:
        assert (one["KIND"], one["N"], one["spilled"]) == (kind, int(n), 0)
        threads = one["num_warps"] * (64 if target.startswith("gfx") else 32)
        assert threads <= 1024, "the most that a GPU starts together"
        assert target.startswith("gfx") or threads * one["registers"] <= 65536


@pytest.mark.parametrize("case", [case for case in CASES if case.split(":")[3] != "1"])
def test_rows_move_16_bytes_at_a_time(kernels: dict[str, list[dict[str, Any]]], case: str) -> None:
    for one in kernels[case]:
        on_amd = case.startswith("gfx")
        rows = [
            access
            for access in one["accesses"]
            if (access.startswith("buffer_") if on_amd else access.endswith(".v4.b32"))
        ]
        assert rows
        if on_amd:
            assert all(access.endswith("_dwordx4") for access in rows)
        else:  # beside rows there are stats, 4 bytes each: T and the maximum, and R
            stats = [access for access in one["accesses"] if access not in rows]
            assert len(stats) <= 3 and all(access.endswith("global.b32") for access in stats)


def test_nothing_is_masked_where_blocks_fit(kernels: dict[str, list[dict[str, Any]]]) -> None:
    fitting = [one["instructions"] for found in kernels.values() for one in found if one["N"] == 4096]
    assert len(fitting) == 2
    for instructions in fitting:
        rows = [one for one in instructions if one.endswith(".128")]
        assert rows and not any(one.startswith("@") for one in rows)


@pytest.mark.parametrize("element_size", [2, 4])
def test_the_rows_in_flight_fit_in_an_l2_cache(element_size: int) -> None:
    # Of an H100: 132 multiprocessors with 65,536 registers, 48 to a thread in backward, which reads A and G.
    for n in (1, 576, 2144, 4864, 5120, 9216, 19456, 36864):
        found = triton_kernels.settings(n, element_size)
        programs = 132 * max(65536 // (48 * 32 * found["num_warps"]), 1)
        assert programs * 2 * n * element_size < (30e6 if element_size == 2 else 50e6)
        assert found["BLOCK"] <= 8 * 32 * found["num_warps"], "more than 8 tokens of a thread may spill"
