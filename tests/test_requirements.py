"""pyproject.toml says what the package needs, and the requirements files say the same for a checkout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from setuptools.config.pyprojecttoml import load_file

ROOT = Path(__file__).parents[1]
PYPROJECT: dict[str, Any] = load_file(ROOT / "pyproject.toml")
PROJECT = PYPROJECT["project"]
# The demo plots; TensorBoard and Weights & Biases are keys of a run's config.
IN_A_CHECKOUT = ("plots", "wandb", "tensorboard")


def by_name(lines: list[str]) -> dict[str, Requirement]:
    return {found.name: found for found in map(Requirement, lines)}


def requirements(name: str) -> dict[str, Requirement]:
    """What a requirements file lists itself, without the files that it includes."""
    lines = (line.partition(" #")[0].strip() for line in (ROOT / name).read_text("utf-8").splitlines())
    return by_name([line for line in lines if line and not line.startswith(("#", "-r"))])


def extra(name: str) -> dict[str, Requirement]:
    """What an extra stands for, other extras that it names included."""
    found: dict[str, Requirement] = {}
    for key, requirement in by_name(PROJECT["optional-dependencies"][name]).items():
        if key == PROJECT["name"]:
            for inner in requirement.extras:
                found |= extra(inner)
        else:
            found[key] = requirement
    return found


def test_a_checkout_installs_what_the_package_needs_and_the_exact_torch_that_is_tested() -> None:
    listed = requirements("requirements.txt")
    wanted = by_name(PROJECT["dependencies"]) | by_name(PYPROJECT["build-system"]["requires"])
    for name in IN_A_CHECKOUT:
        wanted |= extra(name)
    (exact,) = listed["torch"].specifier
    assert exact.operator == "=="
    assert wanted.pop("torch").specifier.contains(exact.version)
    listed.pop("torch")
    assert {str(one) for one in listed.values()} == {str(one) for one in wanted.values()}


def test_the_development_file_is_the_development_extra() -> None:
    assert "-r requirements.txt" in (ROOT / "requirements-dev.txt").read_text("utf-8").splitlines()
    installed = requirements("requirements.txt")
    wanted = {str(one) for name, one in extra("dev").items() if name not in installed}
    assert {str(one) for one in requirements("requirements-dev.txt").values()} == wanted


def test_what_is_optional_is_in_no_other_list() -> None:
    extras = {name: extra(name) for name in PROJECT["optional-dependencies"] if name != "dev"}
    for name, found in extras.items():
        assert not found.keys() & by_name(PROJECT["dependencies"]).keys(), name
        assert found.items() <= extra("dev").items(), name
