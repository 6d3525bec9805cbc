"""The engine's stages are those that were computed, and DeepSpeed's own cutting is what ours replaces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import pytest

from megatron_tokenformer.config.pipeline_cut import stage_bounds, stage_layers
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.metrics_file import read_rows
from megatron_tokenformer.model.language_model import canonical_parameters
from megatron_tokenformer.model.pipeline import pipeline_layers
from megatron_tokenformer.parallel.layout import Layout
from megatron_tokenformer.training.engine import build_engine
from megatron_tokenformer.training.staged_pipeline import StagedPipeline
from tests.ranks import run_ranks
from tests.toy import toy_config, train_toy

HEAD = {"layers": 4, "vocab_size": 512}
"""a head worth about four of these layers"""


def layers_of(layout: Layout, config: RunConfig) -> set[str]:
    module = build_engine(config, layout, accumulation=8).deepspeed.module
    return {name.split(".")[1] for name, _ in canonical_parameters(module) if name.startswith("layers.")}


def test_each_rank_has_the_layers_of_its_stage(tmp_path: Path) -> None:
    config = toy_config(tmp_path, model=HEAD, parallel={"pipeline": 3})
    counts = stage_layers(config)
    assert counts[-1] == 0, "the head is a stage of its own"
    ranks = run_ranks(3, layers_of, config, pipeline=3)
    assert [len(layers) for layers in ranks] == counts
    assert sorted(int(index) for layers in ranks for index in layers) == list(range(4))


def test_a_stage_of_the_head_alone_trains_as_one_process_does(tmp_path: Path) -> None:
    """To 1e-5 over ten steps, with each way to recompute and with documents isolated."""
    losses = []
    for stages, recompute in ((1, "none"), (3, "none"), (3, "scores"), (3, "layer")):
        parallel = {"pipeline": stages}
        config = toy_config(
            tmp_path,
            model=HEAD,
            parallel=parallel,
            data={"isolate_documents": True, "eod_id": 0},
            optimizer={"eps": 1e-5},
            training={"micro_batch_size": 2, "recompute": recompute},
        )
        config = config.model_copy(update={"run_dir": str(tmp_path / f"{stages}-{recompute}")})
        run_ranks(stages, train_toy, config, **parallel)
        rows = read_rows(Path(config.run_dir) / "metrics.jsonl")
        bubbles = [row.get("bubble") for row in rows if "loss" in row]
        assert bubbles == [2 / (4 + 2) if stages == 3 else None] * 10  # p - 1 of m + p - 1
        losses.append([row[key] for row in rows for key in ("loss", "grad_norm", "val_loss") if key in row])
    for found in losses[1:]:
        assert found == pytest.approx(losses[0], abs=1e-5)


class Recording:
    """Beside a pipeline module: what its method leaves behind."""

    def _partition_layers(self, method: Any) -> None:
        before = dict(vars(self))
        super()._partition_layers(method)  # type: ignore[misc]
        self.left = {name: value for name, value in vars(self).items() if before.get(name) is not value}


class Theirs(Recording, deepspeed.PipelineModule):
    pass


class Ours(Recording, StagedPipeline):
    pass


def both_ways(layout: Layout, config: RunConfig) -> list[dict[str, Any]]:
    """What DeepSpeed's own cut by number leaves behind, and what ours does when given the same bounds."""
    layers = pipeline_layers(config.model, layout.tensor)
    theirs = Theirs(layers, topology=layout.topology, partition_method="uniform")
    ours = Ours(layers, topology=layout.topology, partition_method=theirs.parts)
    return [{name: repr(value) for name, value in module.left.items()} for module in (theirs, ours)]


def test_deepspeeds_cut_sets_what_ours_sets(tmp_path: Path) -> None:
    """If a new DeepSpeed keeps more of its cut than `parts` and the bounds, this differs."""
    config = toy_config(tmp_path, model=HEAD)
    for theirs, ours in run_ranks(2, both_ways, config, pipeline=2):
        assert theirs.keys() == ours.keys()
        assert theirs["_local_stop"] == ours["_local_stop"]
        assert theirs.get("_local_start") == ours.get("_local_start")


def test_bounds_cover_the_pipelines_layers(tmp_path: Path) -> None:
    (count,) = run_ranks(1, number_of_layers, toy_config(tmp_path))
    assert stage_bounds(toy_config(tmp_path))[-1] == count


def number_of_layers(layout: Layout, config: RunConfig) -> int:
    return len(pipeline_layers(config.model, layout.tensor))
