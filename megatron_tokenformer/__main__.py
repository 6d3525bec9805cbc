"""The console command `tokenformer`, which starts every command line of the package by its name.

A command is a module in `commands/` with a function `main`, called as its file is; its summary is the first
line of its docstring.  Looking for them imports none: some take seconds.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import sys
from pathlib import Path
from types import MappingProxyType

import megatron_tokenformer
from megatron_tokenformer.errors import UserError, run_cli

PROGRAM = "tokenformer"
PACKAGE = Path(__file__).parent
ELSEWHERE = MappingProxyType({"pretrain": "training/pretrain.py", "progressive": "progressive/__main__.py"})
"""commands that are not in commands/, because launchers start them by their module"""

HELP = """\
usage: {program} COMMAND ...

{about}

commands:
{commands}

`{program} COMMAND --help` says the rest.  Wherever the package can be imported the same commands are
`python -m megatron_tokenformer COMMAND`, and in a checkout all but pretrain and progressive also
`python tools/COMMAND.py`.
"""


def find_commands() -> dict[str, Path]:
    """The source file of every command by its name."""
    found = {path.stem: path for path in sorted(PACKAGE.glob("commands/*.py")) if _has_main(path)}
    return found | {name: PACKAGE / place for name, place in ELSEWHERE.items()}


def summary(path: Path) -> str:
    """The first line of a module's docstring, without importing the module."""
    told = ast.get_docstring(_parsed(path)) or ""
    return told.partition("\n")[0]


def main() -> int | None:
    """Start the command that is named, as if it were a program of its own."""
    commands = find_commands()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        width = max(map(len, commands))
        lines = [f"  {name:<{width}}  {summary(path)}" for name, path in commands.items()]
        about = megatron_tokenformer.__doc__
        print(HELP.format(program=PROGRAM, about=about, commands="\n".join(lines)), end="")
        return 0 if len(sys.argv) > 1 else 2
    if name == "--version":
        print(f"{PROGRAM} {megatron_tokenformer.__version__}")
        return 0
    plain = name.replace("-", "_")
    if plain not in commands:
        close = difflib.get_close_matches(plain, commands, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(commands)}"
        raise UserError(f"unknown command '{name}'; {hint}")
    sys.argv = [f"{PROGRAM} {plain}", *sys.argv[2:]]  # by which argparse calls a program
    place = commands[plain].relative_to(PACKAGE).with_suffix("")
    return importlib.import_module(".".join(["megatron_tokenformer", *place.parts])).main()


def console() -> None:
    """What the installed script calls."""
    run_cli(main)


def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _has_main(path: Path) -> bool:
    return any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in _parsed(path).body)


if __name__ == "__main__":
    console()
