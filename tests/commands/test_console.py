"""The console command `tokenformer`: every command is listed, starts by its name, and costs no import."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import megatron_tokenformer
from megatron_tokenformer.__main__ import ELSEWHERE, find_commands, main, summary
from megatron_tokenformer.errors import UserError

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "deepspeed", "megatron", "numpy", "pydantic", "transformers", "matplotlib", "wandb")


def loaded_after(code: str, *arguments: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after running `code`."""
    ending = "import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{ending}", *arguments], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = loaded_after("import megatron_tokenformer; megatron_tokenformer.__version__")
    assert "megatron_tokenformer" in loaded
    assert not loaded & set(HEAVY)


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_listing_the_commands_loads_nothing_heavy(argument: str) -> None:
    loaded = loaded_after("from megatron_tokenformer.__main__ import main; main()", argument)
    assert not loaded & set(HEAVY)


def test_the_version_is_that_of_the_installed_package() -> None:
    assert megatron_tokenformer.__version__ == version("megatron-tokenformer")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        megatron_tokenformer.nothing  # noqa: B018


def test_a_command_is_a_tool_and_a_tool_a_command() -> None:
    tools = {path.stem for path in ROOT.glob("tools/*.py")}
    assert find_commands().keys() - ELSEWHERE.keys() == tools


def test_help_has_a_line_for_each_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["tokenformer", "--help"])
    assert main() == 0
    lines = capsys.readouterr().out.splitlines()
    for name, path in find_commands().items():
        assert summary(path).endswith((".", ":")), f"{path} begins with no sentence of one line"
        assert any(line.split() == [name, *summary(path).split()] for line in lines)


@pytest.mark.parametrize("name", find_commands())
def test_a_command_calls_itself_and_others_as_it_was_called(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An installation has no tools/ folder, so no help text may send anyone there."""
    monkeypatch.setattr(sys, "argv", ["tokenformer", name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        main()
    told = capsys.readouterr().out
    assert told.startswith(f"usage: tokenformer {name} ")
    assert "tools/" not in told
    called = re.findall(r"tokenformer (\w+) -", told) + re.findall(
        r"megatron_tokenformer\.commands\.(\w+)", told
    )
    assert set(called) <= find_commands().keys()
    module = find_commands()[name].relative_to(ROOT).with_suffix("")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(".".join(module.parts)).main()
    assert "tokenformer " + name not in capsys.readouterr().out.splitlines()[0]


def test_dashes_do_for_underscores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["tokenformer", "inspect-dataset", str(tmp_path / "nothing")])
    with pytest.raises(UserError, match="nothing"):
        main()


def test_an_unknown_command_is_refused_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tokenformer", "grow_chekpoint"])
    with pytest.raises(UserError, match="unknown command 'grow_chekpoint'; did you mean 'grow_checkpoint'"):
        main()


def test_no_command_shows_them_all_and_is_wrong_usage() -> None:
    done = subprocess.run([sys.executable, "-m", "megatron_tokenformer"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "preprocess_data" in done.stdout


SAYS_MUCH = """
import sys
from megatron_tokenformer.errors import run_cli
def main():
    print("x" * {count}, file={stream})
    {then}
run_cli(main)
"""


@pytest.mark.parametrize("stream", ["sys.stdout", "sys.stderr"])
@pytest.mark.parametrize("count", [10, 1_000_000])  # within a buffer, and more than a pipe takes
@pytest.mark.parametrize("then", ["return 0", "sys.exit(0)"])
def test_a_reader_that_ends_is_no_error_to_speak_of(stream: str, count: int, then: str) -> None:
    code = SAYS_MUCH.format(count=count, then=then, stream=stream)
    ending, pipe = os.pipe()
    os.close(ending)
    out, err = (pipe, subprocess.PIPE) if stream == "sys.stdout" else (subprocess.PIPE, pipe)
    ended = subprocess.run([sys.executable, "-c", code], stdout=out, stderr=err)
    os.close(pipe)
    assert (ended.returncode, ended.stdout or b"", ended.stderr or b"") == (141, b"", b"")


def test_a_pipe_of_another_kind_that_breaks_keeps_its_traceback() -> None:
    code = (
        "from megatron_tokenformer.errors import run_cli\ndef main(): raise BrokenPipeError(1)\nrun_cli(main)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 1 and "Traceback" in ended.stderr


def test_a_tool_may_be_cut_short() -> None:
    words = f"{sys.executable} tools/evaluate.py --help | head -c 20; echo ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", words], cwd=ROOT, capture_output=True, text=True)
    assert ended.stderr == ""
    assert ended.stdout.startswith("usage: ") and ended.stdout[20:] in ("141\n", "0\n")
