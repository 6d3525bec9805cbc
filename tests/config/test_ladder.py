"""Every config in configs/ builds, and its size is what its name says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megatron_tokenformer.config.growth import changes_of_widening
from megatron_tokenformer.config.load import load_config
from megatron_tokenformer.config.schema import RunConfig, check_world
from megatron_tokenformer.config.sizes import parameter_count
from megatron_tokenformer.data.outputs import Names
from megatron_tokenformer.model.language_model import full_shapes
from megatron_tokenformer.progressive.journal import read_journal
from megatron_tokenformer.progressive.launchers import LAUNCHERS, grow_command
from megatron_tokenformer.progressive.plan import load_plan
from megatron_tokenformer.progressive.stages import dry_run

CONFIGS = Path(__file__).parents[2] / "configs"
# In millions.  The paper's 1.5B counts no embedding: 1,510 M in the layers, 1,587 M in all.
NAMED = {
    "124m": 124,
    "354m": 354,
    "757m": 757,
    "1.4b": 1400,
    "150m": 150,
    "450m": 450,
    "900m": 900,
    "1.5b": 1587,
}
DENSE = {"124m": 123.6, "354m": 353.6, "757m": 756.9, "1.3b": 1311.2}


# The values of meta.pile_set_name in the Pile's files.
PILE = (
    "Pile-CC, PubMed Central, Books3, OpenWebText2, ArXiv, Github, FreeLaw, StackExchange, "
    "USPTO Backgrounds, PubMed Abstracts, Gutenberg (PG-19), OpenSubtitles, Wikipedia (en), DM Mathematics, "
    "Ubuntu IRC, BookCorpus2, EuroParl, HackerNews, YoutubeSubtitles, PhilPapers, NIH ExPorter, Enron Emails"
).split(", ")


def check_size(config: RunConfig, millions: float) -> None:
    parameters = sum(math.prod(shape) for shape in full_shapes(config.model).values())
    assert parameters == parameter_count(config.model)
    assert parameters == pytest.approx(millions * 1e6, rel=0.03)


def test_every_config_is_tested() -> None:
    tested = {f"tokenformer-{name}" for name in NAMED} | {f"transformer-{name}" for name in DENSE}
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == tested


@pytest.mark.parametrize("name", NAMED)
def test_size_is_as_named(name: str) -> None:
    config = load_config(CONFIGS / f"tokenformer-{name}.yaml")
    check_size(config, NAMED[name])
    assert config.run_dir == f"runs/tokenformer-{name}"
    for world in (1, 8, 64):
        check_world(config, world)


@pytest.mark.parametrize("name, twin", zip(DENSE, ("124m", "354m", "757m", "1.4b")))
def test_a_dense_twin_differs_in_its_layers_and_rates_alone(name: str, twin: str) -> None:
    config, ours = (
        load_config(CONFIGS / f"transformer-{name}.yaml"),
        load_config(CONFIGS / f"tokenformer-{twin}.yaml"),
    )
    check_size(config, DENSE[name])
    assert parameter_count(config.model) == pytest.approx(parameter_count(ours.model), rel=0.065)
    assert config.run_dir == f"runs/transformer-{name}"
    assert (config.data, config.training) == (ours.data, ours.training)
    rates = {"lr": ours.optimizer.lr, "min_lr": ours.optimizer.min_lr}
    assert config.optimizer.model_copy(update=rates) == ours.optimizer
    assert config.optimizer.min_lr == pytest.approx(config.optimizer.lr / 10)


def test_the_ladder_grows_stage_by_stage() -> None:
    plan = load_plan(CONFIGS / "progressive" / "pile-124m-to-1.4b.yaml")
    assert [stage.name for stage in plan.stages] == ["124m", "354m", "757m", "1.4b"]
    for stage in plan.stages:
        check_size(stage.config, NAMED[stage.name])
        tokens = stage.config.model.tokens
        assert tokens.qkv % 32 == 0 and tokens.ffn == 4 * tokens.qkv
        assert stage.config.training.global_batch_size * stage.config.data.sequence_length == 2**19


def test_the_dense_ladder_grows_in_width_exactly(tmp_path: Path) -> None:
    plan = load_plan(CONFIGS / "progressive" / "pile-net2net.yaml")
    ours = load_plan(CONFIGS / "progressive" / "pile-124m-to-1.4b.yaml")
    for stage, millions in zip(plan.stages, (123.6, 417.2, 1514.0), strict=True):
        check_size(stage.config, millions)
        assert stage.config.training.global_batch_size == ours.stages[0].config.training.global_batch_size
        assert stage.config.data == ours.stages[0].config.data
    for one, other in zip(plan.stages, plan.stages[1:]):
        assert changes_of_widening(one.config.model, other.config.model) == []
    commands = dry_run(plan, read_journal(tmp_path), LAUNCHERS["local"], grow_command)
    assert commands.count("--spread 0.5 --optimizer carry") == 2


def test_the_demo_has_each_layout_and_comparable_losses() -> None:
    stages = load_plan(CONFIGS / "progressive" / "demo.yaml").stages
    layouts = [stage.layout for stage in stages]
    assert layouts[0] == "data 2" and "tensor 2, sequence" in layouts and "pipeline 2" in layouts
    evaluated = {
        (str(s.config.data), s.config.training.eval_steps, s.config.training.global_batch_size)
        for s in stages
    }
    assert len(evaluated) == 1
    for stage in stages:
        assert sum(map(math.prod, full_shapes(stage.config.model).values())) == parameter_count(
            stage.config.model
        )


def test_the_piles_components_are_a_second_base_with_the_names_that_preprocessing_gives(
    tmp_path: Path,
) -> None:
    (tmp_path / "run.yaml").write_text(f"base: [{CONFIGS}/tokenformer-124m.yaml, {CONFIGS}/data/pile.yaml]")
    config = load_config(tmp_path / "run.yaml")
    names = Names("data/pile", "text", overwrite=False)
    assert {prefix for _, prefix in config.data.train} == {names.of(component) for component in PILE}
    assert sum(weight for weight, _ in config.data.train) == pytest.approx(100.0)
    assert config.model.tokens.qkv == 576
