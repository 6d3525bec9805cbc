"""Every command, option and key that a page names is there."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import re
import sys
from pathlib import Path
from unittest import mock

import pytest
from pydantic import BaseModel

from megatron_tokenformer.__main__ import find_commands
from megatron_tokenformer.config.reference import own_keys, sections
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.progressive.schema import Schedule
from tests.docs.pages import PAGES, ROOT, ours

CALL = re.compile(
    r"(?:(?<![\w/])tools/(\w+)\.py|(?<![\w/`.])`?tokenformer ([a-z]\w+)"
    r"|megatron_tokenformer\.(?:commands|training)\.(\w+)|megatron_tokenformer\.(progressive)\b)([^`\n#]*)"
)
OPTION = re.compile(r"(?<![\w-])--[a-zA-Z][\w-]*")
OWN_WORDS = [page for page in PAGES if page.stem != "coming-from"]
SECTIONS = (*(name for name, _, _ in sections(RunConfig)), "launch")
KEY = re.compile(rf"(?<![\w./])({'|'.join(SECTIONS)})\.([a-z_]+(?:\.[a-z_]+)*)(?![\w/(-])")
INLINE = re.compile(r"`([^`]+)`")
FOREIGN = {
    *("--hostfile", "--module", "--num_gpus", "--master_port"),  # deepspeed
    *("--nproc-per-node", "--node-rank", "--rdzv-conf", "--signals-to-handle"),  # torchrun
    *("--array", "--cpus-per-task", "--distribution", "--exclude", "--kill-on-bad-exit"),  # SLURM
    *("--ntasks-per-node", "--requeue", "--signal"),
    *("--corpus", "--gpt-neox", "--huggingface-megabytes", "--megabytes", "--megatron-lm"),  # benchmarks/
    *("--rounds", "--lr", "--old", "--seeds"),
}
"""options of other programs, and of those in benchmarks/ and examples/"""
NO_KEY = re.compile(r"\.(py|md|yaml|json|jsonl|bin|idx|safetensors)$")


@functools.cache
def options(command: str) -> set[str]:
    """The options in a command's usage lines."""
    module = find_commands()[command].relative_to(ROOT).with_suffix("")
    told = io.StringIO()
    with mock.patch.object(sys, "argv", [command, "--help"]), contextlib.redirect_stdout(told):
        with pytest.raises(SystemExit):
            importlib.import_module(".".join(module.parts)).main()
    return {"--help", *OPTION.findall(told.getvalue().partition("\n\n")[0])}


def keys(schema: type[BaseModel], path: str = "") -> set[str]:
    """The keys of a schema, and the names of its sections."""
    found = {key.name for key in own_keys(schema, path)}
    for name, section, inner in sections(schema, path):
        found |= {name, *keys(section, inner)}
    return found


def calls(page: Path) -> list[tuple[str, list[str]]]:
    """The commands that a page names or shows, each with the options behind it."""
    found = []
    for *names, rest in CALL.findall(ours(page)):
        (name,) = filter(None, names)
        found.append((name, OPTION.findall(rest)))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_and_options_exist(page: Path) -> None:
    for name, given in calls(page):
        assert name in find_commands(), f"{page.name} names a command {name}"
        missing = set(given) - options(name)
        assert not missing, f"{page.name}: {name} has no {', '.join(missing)}"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.stem != "coming-from"], ids=lambda page: page.stem
)
def test_options_that_stand_alone_are_of_some_command(page: Path) -> None:
    known = FOREIGN.union(*(options(command) for command in find_commands()))
    named = {option for text in INLINE.findall(ours(page)) for option in OPTION.findall(text)}
    assert named <= known, f"{page.name}: no command has {', '.join(sorted(named - known))}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_keys_exist(page: Path) -> None:
    known = keys(RunConfig) | keys(Schedule)
    named = {".".join(parts) for parts in KEY.findall(ours(page))}
    missing = {key for key in named if not NO_KEY.search(key)} - known
    assert not missing, f"{page.name} names {', '.join(sorted(missing))}"


def test_this_would_notice() -> None:
    """The pages name enough for these tests to mean something."""
    shown = [call for page in PAGES for call in calls(page)]
    assert len({option for _, given in shown for option in given}) > 20
    assert len({key for page in PAGES for key in KEY.findall(ours(page))}) > 60
    assert "--load" in options("evaluate") and "--lode" not in options("evaluate")


def test_every_command_is_in_the_documentation() -> None:
    named = {name for page in PAGES for name, _ in calls(page)}
    assert find_commands().keys() <= named
