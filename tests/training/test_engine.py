"""What DeepSpeed must be told: each setting is here because leaving it out goes wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_tokenformer.checkpoint.blocks import read_blocks
from megatron_tokenformer.checkpoint.manifest import FIRST_MOMENT, read_manifest
from megatron_tokenformer.checkpoint.store import find_checkpoint
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.model.language_model import LanguageModel, canonical_parameters, initialize
from megatron_tokenformer.parallel.collectives import TensorParallel
from megatron_tokenformer.parallel.layout import Layout
from megatron_tokenformer.training.engine import build_engine, device_precision
from tests.ranks import run_ranks
from tests.toy import toy_config, train_toy


def describe(layout: Layout, config: RunConfig) -> dict[str, object]:
    engine = build_engine(config, layout, accumulation=4).deepspeed
    parameters = dict(canonical_parameters(engine.module))
    return {
        "stage": engine.zero_optimization_stage(),
        "groups": len(engine.optimizer.optimizer.param_groups),
        "clip": engine.gradient_clipping(),
        "boundary": (engine.is_pipe_partitioned, engine.is_grad_partitioned),
        "marked": {name for name, p in parameters.items() if p.tensor_model_parallel},
        "names": set(parameters),
        "dtype": {p.dtype for p in parameters.values()},
        "optimizer": type(engine.optimizer).__name__,
        "accumulates": getattr(engine.optimizer, "grad_acc_dtype", None),
        "adam": (type(engine.optimizer.optimizer).__name__, engine.optimizer.optimizer.defaults["fused"]),
    }


@pytest.mark.parametrize(
    "precision, dtype, optimizer",
    [
        ("fp32", torch.float32, "DeepSpeedZeroOptimizer"),
        ("auto", torch.float32, "DeepSpeedZeroOptimizer"),  # no GPU here
        ("bf16", torch.bfloat16, "BF16_Optimizer"),  # the one that can accumulate gradients in fp32
    ],
)
def test_the_engine_is_as_told(tmp_path: Path, precision: str, dtype: torch.dtype, optimizer: str) -> None:
    config = toy_config(
        tmp_path,
        parallel={"tensor": 2, "pipeline": 2, "sequence": True},
        training={"precision": precision, "micro_batch_size": 2},
        optimizer={"clip_grad": 0.0},
    )
    stages = run_ranks(4, describe, config, tensor=2, pipeline=2, sequence=True)
    for found in stages:
        assert found["stage"] == 1
        assert found["groups"] == 1, "every pipeline stage has the same number of optimizer groups"
        assert found["clip"] == 0.0, "no clipping is no clipping"
        assert found["boundary"] == (False, False)
        assert found["marked"] == {name for name in found["names"] if not name.startswith("final_norm")}
        assert (found["dtype"], found["optimizer"]) == ({dtype}, optimizer)
        assert found["accumulates"] is (torch.float32 if precision == "bf16" else None)
        assert found["adam"] == ("AdamW", True)
    first, last = stages[0]["names"], stages[-1]["names"]
    assert first & last == {"embedding.weight"}, "tied, and nothing else is twice"
    assert len(first | last) == 2 * 10 + 3


@pytest.mark.parametrize("ranks", [1, 2])
def test_in_bf16_the_gradient_that_reaches_adam_is_a_sum_in_fp32(tmp_path: Path, ranks: int) -> None:
    """DeepSpeed rounds it to bf16 otherwise, be it over several data ranks or one."""
    training = {"precision": "bf16", "steps": 1, "micro_batch_size": 1, "eval_steps": 0}
    config = toy_config(tmp_path, training=training, optimizer={"clip_grad": 0.0, "warmup_steps": 0})
    run_ranks(ranks, train_toy, config)
    path = find_checkpoint(config.run_dir)
    manifest = read_manifest(path)
    (gradient,) = (
        moment / (1.0 - config.optimizer.betas[0])
        for _, moment in read_blocks(path, manifest, "embedding.weight", FIRST_MOMENT, 2**20)
    )
    lost = ((gradient - gradient.bfloat16().float()).abs() / gradient.abs())[gradient != 0]
    assert lost.median() > 2.0**-11, "of what bf16 keeps, 2^-9 at most is lost; of sums in bf16 nothing is"


def initial_values(layout: Layout, config: RunConfig) -> dict[str, torch.Tensor]:
    module = build_engine(config, layout, accumulation=4).deepspeed.module
    return {name: p.detach().clone() for name, p in canonical_parameters(module)}


def test_every_layout_starts_from_bit_identical_weights(tmp_path: Path) -> None:
    config = toy_config(tmp_path, parallel={"tensor": 2, "pipeline": 2}, training={"micro_batch_size": 2})
    whole = LanguageModel(config.model)
    initialize(whole, config.model, config.training.seed, TensorParallel())
    ranks = run_ranks(4, initial_values, config, tensor=2, pipeline=2)
    for name, parameter in whole.named_parameters():
        for pair in (ranks[:2], ranks[2:]):
            if name in pair[0]:
                parts = [values[name] for values in pair]
                assert torch.equal(torch.cat(parts) if parameter.dim() == 2 else parts[1], parameter), name


def refuse_fp16(layout: Layout, config: RunConfig) -> str:
    with pytest.raises(UserError) as refused:
        build_engine(config, layout, accumulation=8)
    return str(refused.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes in fp16")
def test_fp16_is_refused_in_words_where_it_cannot_be(tmp_path: Path) -> None:
    (words,) = run_ranks(1, refuse_fp16, toy_config(tmp_path, training={"precision": "fp16"}))
    assert words == "training.precision=fp16 is not supported on this device; bf16 or fp32 would work"


@pytest.mark.parametrize("wanted", ["auto", "bf16"])
def test_bf16_is_refused_where_it_is_emulated(
    tmp_path: Path, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, gpu = toy_config(tmp_path, training={"precision": wanted}), SimpleNamespace(type="cuda")
    layout: Any = SimpleNamespace(device=gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    with pytest.raises(UserError, match=f"precision={wanted} is bf16, which this GPU only emulates; fp16 or"):
        device_precision(config, layout)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert device_precision(config, layout) == "bf16"


def test_no_collective_is_compiled_at_start(tmp_path: Path) -> None:
    """DeepSpeed would build a C++ extension here; without a compiler its start would crash."""
    program = (
        "from megatron_tokenformer.config.schema import Parallel\n"
        "from megatron_tokenformer.quiet import quiet_imports\n"
        "with quiet_imports():\n"
        "    from megatron_tokenformer.parallel import layout, environment\n"
        "import subprocess\n"
        "def refuse(*command, **_): raise AssertionError(f'a compiler was started: {command}')\n"
        "subprocess.Popen = refuse\n"
        "here = layout.start(Parallel(), environment.find_processes({}))\n"
        "layout.stop()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "", "third-party noise stays out of the log"
