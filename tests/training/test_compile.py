"""training.compile: each layer compiled by itself trains the same model, and exchanges what it did.

The backends are dynamo's own, without the code generator, which needs a C++ compiler: what is at stake here,
which parts of a layer are traced and which are not, is dynamo's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.config.traffic import Traffic, total
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.metrics_file import read_rows
from megatron_tokenformer.parallel.layout import Layout
from megatron_tokenformer.parallel.traffic import count_traffic
from megatron_tokenformer.training import engine
from megatron_tokenformer.training.batches import pipeline_batches
from megatron_tokenformer.training.loop import train, train_step
from megatron_tokenformer.training.run import open_run
from tests.ranks import run_ranks
from tests.toy import DENSE, toy_config

LAYERS = 2


def train_compiled(layout: Layout, config: RunConfig) -> tuple[int, int]:
    """Train; return how many graphs were compiled, and how many frames were given up on."""
    engine.COMPILE_BACKEND = "aot_eager"
    train(config, layout)
    frames = counters["frames"]
    return counters["stats"]["unique_graphs"], frames["total"] - frames["ok"]


def configs(
    folder: Path, parallel: dict[str, Any], model: dict[str, Any], **training: Any
) -> list[RunConfig]:
    """The same run without and with training.compile."""
    return [
        toy_config(
            folder,
            parallel=parallel,
            model={**model, "layers": LAYERS},
            optimizer={"eps": 1e-5},  # see tests/training/test_layouts.py
            training={"steps": 3, "micro_batch_size": 2, "compile": compiled, **training},
        ).model_copy(update={"run_dir": str(folder / f"compile {compiled}")})
        for compiled in (False, True)
    ]


@pytest.mark.parametrize(
    "parallel, model, recompute",
    [
        ({}, {}, "none"),
        ({}, {}, "scores"),
        ({"tensor": 2}, {}, "none"),
        ({"tensor": 2, "sequence": True}, {}, "scores"),
        ({"tensor": 2}, DENSE, "layer"),
    ],
)
def test_losses_are_those_without(
    tmp_path: Path, parallel: dict[str, Any], model: dict[str, Any], recompute: str
) -> None:
    found = []
    for config in configs(tmp_path, parallel, model, recompute=recompute):
        for graphs, failed in run_ranks(parallel.get("tensor", 1), train_compiled, config, **parallel):
            assert (graphs > 0, failed) == (config.training.compile, 0)
        rows = read_rows(Path(config.run_dir) / "metrics.jsonl")
        found.append([row[key] for row in rows for key in ("loss", "val_loss", "grad_norm") if key in row])
    assert len(found[0]) == 2 * 3 + 2
    assert found[1] == pytest.approx(found[0], abs=1e-5)


def count_collectives(layout: Layout, config: RunConfig) -> tuple[dict[tuple[str, str], Traffic], set[str]]:
    """What the second step exchanges, and all operators that were traced into graphs."""
    traced: set[str] = set()

    def trace_only(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        traced.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    engine.COMPILE_BACKEND = trace_only
    with open_run(config, layout) as run:
        batches = pipeline_batches(run.training_data, 0, config, layout, run.accumulation, run.eod_id)
        train_step(run, batches)
        with count_traffic(layout) as calls:
            train_step(run, batches)
    return total(calls), traced


@pytest.mark.parametrize("model", [{}, DENSE], ids=["tokenformer", "transformer"])
def test_collectives_stay_outside_and_are_the_same(tmp_path: Path, model: dict[str, Any]) -> None:
    parallel = {"tensor": 2, "sequence": True}
    plain, compiled = (
        run_ranks(2, count_collectives, config, **parallel) for config in configs(tmp_path, parallel, model)
    )
    for (expected, nothing), (counted, traced) in zip(plain, compiled):
        assert counted == expected and not nothing
        assert any("layer_norm" in name for name in traced)
        assert not [name for name in traced if "c10d" in name or "reduce" in name or "gather" in name]


def test_without_a_compiler_it_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(UserError) as refused:
        engine.check_can_compile(torch.device("cpu"))
    assert str(refused.value) == (
        "training.compile=true needs a compiler (/nowhere/g++), which is not here; training.compile=false "
        "would work"
    )
    monkeypatch.setenv("CXX", "sh")  # is there on any machine
    engine.check_can_compile(torch.device("cpu"))
