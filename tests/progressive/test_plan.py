"""A schedule is resolved and checked as a whole before anything starts, and refused in words."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_tokenformer.data.indexed import TokenFileWriter
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.progressive.plan import load_plan
from tests.descriptions import describe

Tree = dict[str, Any]
Write = Callable[[Tree], Path]


def test_a_stage_is_base_then_common_then_its_own_keys(schedule: Tree, write: Write, tmp_path: Path) -> None:
    base = "optimizer: {lr: 1e-3, min_lr: 1e-5}\ntraining: {steps: 7, seed: 5}\nrun_dir: elsewhere\n"
    (tmp_path / "base.yaml").write_text(base)
    schedule["stages"][1]["base"] = "base.yaml"
    schedule["stages"][1]["config"]["optimizer"] = {"lr": 2e-3}
    a, b, _ = load_plan(write(schedule)).stages
    assert (b.config.optimizer.lr, b.config.optimizer.min_lr) == (2e-3, 1e-5)
    assert (b.config.training.steps, b.config.training.seed) == (4, 5)
    assert (a.config.training.seed, a.config.checkpoint.load, a.previous) == (1234, None, None)
    run = Path(schedule["run_dir"])
    assert (b.folder, b.config.checkpoint.load, b.previous) == (run / "b", str(run / "b" / "init"), "a")


def test_overrides_reach_the_schedule_and_a_stage_by_name(schedule: Tree, write: Write) -> None:
    schedule["stages"][1]["name"] = "1.4b"  # with a dot, as model sizes have
    overrides = ["common.training.steps=9", "stages.1.4b.config.training.steps=11", "launch.nodes=2"]
    plan = load_plan(write(schedule), overrides)
    assert [stage.config.training.steps for stage in plan.stages] == [9, 11, 9]
    assert plan.stages[0].nodes == 2
    with pytest.raises(UserError, match=r"NAME one of: a, 1\.4b, c"):
        load_plan(write(schedule), ["stages.b.config.training.steps=1"])


def test_layouts_in_words(schedule: Tree, write: Write) -> None:
    schedule["stages"][1]["config"]["parallel"]["sequence"] = True
    layouts = [stage.layout for stage in load_plan(write(schedule), ["stages.b.nodes=2"]).stages]
    assert layouts == ["data 2", "tensor 2, sequence, data 2", "pipeline 2"]


def change(path: str, value: object) -> Callable[[Tree], None]:
    """Set the value at `a.0.b` in a tree."""

    def apply(tree: Any) -> None:
        *parts, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        for part in parts:
            tree = tree[part] if isinstance(part, int) else tree.setdefault(part, {})
        tree[last] = value

    return apply


FEWER = {"qkv": 8, "output": 8, "ffn": 16}


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (change("lanch", {}), "unknown key 'lanch'; did you mean 'launch'?"),
        (change("common.training.stepz", 1), "stage 'a': config: unknown key 'training.stepz'; did you mean"),
        (change("stages", []), "stages="),
        (change("stages.1.name", "a"), "'a' is used twice"),
        (change("stages.1.name", "b/c"), "'b/c' cannot name a folder"),
        (change("stages.1.name", "journal.json"), "cannot name a folder"),
        (change("stages.0.growth", {}), "stage 'a' is the first and grows from nothing"),
        (change("stages.0.config.optimizer", {"old_token_lr_scale": 0.5}), "none of its tokens are older"),
        (change("stages.1.growth", {"keys": "zero", "values": "zero"}), "never learns"),
        (change("stages.1.growth", {"tau": "keep", "tau_steps": 5}), "tau_steps belongs to tau=anneal"),
        (change("stages.1.processes_per_node", 3), "stage 'b': parallel.tensor=2 x parallel.pipeline=1 does"),
        (change("stages.1.config.parallel.tensor", 3), "not divisible by parallel.tensor=3"),
        (
            change("stages.1.config.model.layers", 3),
            "'b': grown from 'a': growth keeps model.layers: it was 2",
        ),
        (change("stages.2.config.model.tokens", FEWER), "takes no tokens away: model.tokens.qkv was 16"),
        (change("stages.1.config.model.tokens.output", 4), "takes no tokens away: model.tokens.output was 8"),
        (change("common.model.score_norm", "softmax"), "allow_inexact accepts that"),
        (change("common.run_dir", "x"), "give it no other"),
        (change("stages.1.config.checkpoint", {"load": "x"}), "starts from 'a', grown"),
        (change("common.data.train", []), "data.train is empty"),
        (change("launch.slurm", {"time": 86400}), "put it in quotes"),
        (change("stages.1.base", "no.yaml"), "stage 'b': cannot read the config"),
    ],
)
def test_refused_in_words(schedule: Tree, write: Write, edit: Callable[[Tree], None], words: str) -> None:
    edit(schedule)
    with pytest.raises(UserError) as refusal:
        load_plan(write(schedule))
    assert words in str(refusal.value)
    assert refusal.value.exit_code == 2


def test_stages_with_data_of_two_tokenizers_are_refused_before_the_first_starts(
    schedule: Tree, write: Write, tmp_path: Path
) -> None:
    for name, fingerprint in (("one", "a" * 64), ("other", "b" * 64)):
        with TokenFileWriter(str(tmp_path / name), np.dtype(np.uint16)) as writer:
            writer.add(np.arange(100), np.array([100]))
            writer.finish()
        describe(str(tmp_path / name), fingerprint)
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    schedule["common"]["data"] |= {"train": one, "validation": one}
    assert len(load_plan(write(schedule)).stages) == 3
    schedule["stages"][2]["config"]["data"] = {"train": [[1, one], [1, other]]}
    with pytest.raises(UserError) as refusal:
        load_plan(write(schedule))
    assert f"{one} was made with a.json (hash aaaaaaaaaaaa), {other} with b.json" in str(refusal.value)
    assert refusal.value.exit_code == 2


def test_a_stage_that_does_not_grow_is_refused(schedule: Tree, write: Write) -> None:
    schedule["stages"][2]["config"]["model"] = schedule["stages"][1]["config"]["model"]
    with pytest.raises(UserError, match="stage 'c': grown from 'b': nothing grows"):
        load_plan(write(schedule))


def test_the_stage_machine_imports_no_framework() -> None:
    """It waits for days beside the ranks, and starts in a moment."""
    program = (
        "import sys, megatron_tokenformer.progressive.__main__, megatron_tokenformer.progressive.stages;"
        "print({'torch', 'deepspeed', 'megatron'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
