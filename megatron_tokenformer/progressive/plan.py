"""From a schedule to a plan: every stage's whole run config, resolved and checked before anything starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_tokenformer.config.growth import Growth, check_any_growth
from megatron_tokenformer.config.load import Tree, merge, parse_override, read_yaml, validate
from megatron_tokenformer.config.schema import RunConfig, check_world
from megatron_tokenformer.data.pair import require_pair
from megatron_tokenformer.data.provenance import TokenizerRecord, one_tokenizer, read_tokenizer
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.progressive.schema import Launch, Schedule, StageConfig


@dataclass(frozen=True)
class Stage:
    """A stage as it will run."""

    name: str
    config: RunConfig
    nodes: int
    processes_per_node: int
    previous: str | None
    """the stage that it grows from; None for the first"""
    growth: Growth

    @property
    def folder(self) -> Path:
        """The stage's run_dir."""
        return Path(self.config.run_dir)

    @property
    def run_file(self) -> Path:
        """The resolved config that the stage's commands get."""
        return self.folder / "run.yaml"

    @property
    def grown(self) -> Path:
        """Where the grown checkpoint goes that the stage starts from."""
        return self.folder / "init"

    @property
    def layout(self) -> str:
        """How the processes share the work, in a few words."""
        parallel, world = self.config.parallel, self.nodes * self.processes_per_node
        sizes = {
            "tensor": parallel.tensor,
            "pipeline": parallel.pipeline,
            "data": world // (parallel.tensor * parallel.pipeline),
        }
        words = [f"{name} {size}" for name, size in sizes.items() if size > 1]
        if parallel.sequence and parallel.tensor > 1:
            words.insert(1, "sequence")
        return ", ".join(words) or "1 process"

    @property
    def prefixes(self) -> list[str]:
        """The datasets that it reads."""
        return [prefix for _, prefix in (*self.config.data.train, *self.config.data.validation)]

    def require_data(self) -> None:
        """See that the files of all its datasets are on this host.

        Raises:
            UserError: one is missing; with a guess at what was meant.
        """
        for prefix in self.prefixes:
            with _naming(f"stage '{self.name}'"):
                require_pair(prefix)


@dataclass(frozen=True)
class Plan:
    """All stages in order, and where they run."""

    folder: Path
    launch: Launch
    stages: list[Stage]


def load_plan(path: str | Path, overrides: list[str] | None = None) -> Plan:
    """The plan that a schedule's YAML file and `key=value` overrides describe.

    An override names a key of the schedule, such as `common.training.steps=10`, or one of a stage by the
    stage's name: `stages.small.config.training.steps=10`.

    Raises:
        UserError: anything that would stop a stage later: keys, layouts, a growth that is none, data of
            different tokenizers, as far as their descriptions are here already.
    """
    path = Path(path)
    tree = read_yaml(path)
    for text in overrides or []:
        _override(tree, text)
    schedule = validate(Schedule, tree, str(path))
    stages: list[Stage] = []
    for wanted in schedule.stages:
        with _naming(f"{path}, stage '{wanted.name}'"):
            stages.append(_resolve(schedule, wanted, path, stages[-1] if stages else None))
    with _naming(str(path)):
        one_tokenizer(_tokenizers(stages))
    return Plan(Path(schedule.run_dir), schedule.launch, stages)


def _override(tree: Tree, text: str) -> None:
    """Apply one override; a stage's name may hold dots, so it is looked up before the key is split."""
    if not text.startswith("stages."):
        merge(tree, parse_override(text))
        return
    stages = tree.get("stages")
    listed = stages if isinstance(stages, list) else []
    named = {stage.get("name"): stage for stage in listed if isinstance(stage, dict)}
    for name, stage in named.items():
        if text.startswith(f"stages.{name}."):
            merge(stage, parse_override(text.removeprefix(f"stages.{name}.")))
            return
    raise UserError(
        f"'{text}' names no stage; write stages.NAME.key=value with NAME one of: {', '.join(map(str, named))}"
    )


def _resolve(schedule: Schedule, wanted: StageConfig, path: Path, previous: Stage | None) -> Stage:
    given = merge(deepcopy(schedule.common), deepcopy(wanted.config))
    folder = Path(schedule.run_dir) / wanted.name
    if "run_dir" in given:
        raise UserError(f"the stage's run_dir is {folder}, from the schedule's; give it no other")
    if previous and isinstance(given.get("checkpoint"), dict) and "load" in given["checkpoint"]:
        raise UserError(f"the stage starts from '{previous.name}', grown; give it no checkpoint.load")
    tree = read_yaml(path.parent / wanted.base) if wanted.base else {}
    merge(merge(tree, given), {"run_dir": str(folder)})
    config = validate(RunConfig, tree, "config")
    if config.logging.wandb.group is None:
        merge(tree, {"logging": {"wandb": {"group": folder.parent.absolute().name}}})
        config = validate(RunConfig, tree, "config")
    if not config.data.train:
        raise UserError("data.train is empty; give the prefix of a preprocessed dataset")
    stage = Stage(
        name=wanted.name,
        config=config,
        nodes=wanted.nodes or schedule.launch.nodes,
        processes_per_node=wanted.processes_per_node or schedule.launch.processes_per_node,
        previous=previous.name if previous else None,
        growth=wanted.growth or Growth(),
    )
    check_world(config, stage.nodes * stage.processes_per_node)
    if previous is None:
        if config.optimizer.old_token_lr_scale < 1.0 and config.checkpoint.load is None:
            raise UserError(
                "the stage is the first, so none of its tokens are older; "
                "give optimizer.old_token_lr_scale to later ones alone"
            )
        return stage
    with _naming(f"grown from '{previous.name}'"):
        check_any_growth(previous.config.model, config.model, stage.growth)
    merge(tree, {"checkpoint": {"load": str(stage.grown)}})
    return replace(stage, config=validate(RunConfig, tree, "config"))


def _tokenizers(stages: list[Stage]) -> Iterator[tuple[str, TokenizerRecord | None]]:
    for stage in stages:
        for prefix in stage.prefixes:
            yield prefix, read_tokenizer(prefix)


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Say in errors what they are about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}", error.exit_code) from None
