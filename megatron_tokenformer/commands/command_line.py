"""What all command lines have in common: how their help is laid out, and how it calls other commands."""

from __future__ import annotations

import argparse
import re
import sys

CONSOLE = "tokenformer "


def as_started(text: str) -> str:
    """A text with commands as in a checkout, `python tools/NAME.py`, made to call them as this one was.

    An installation has no tools/: there they are `tokenformer NAME`, and for launchers, which take a module,
    `-m megatron_tokenformer.commands.NAME`.
    """
    if not sys.argv[0].startswith(CONSOLE):
        return text
    text = re.sub(r"(?:python )tools/(\w+)\.py", rf"{CONSOLE}\1", text)
    text = re.sub(r"(torchrun [^\n]*?)tools/(\w+)\.py", r"\1-m megatron_tokenformer.commands.\2", text)
    return re.sub(r"tools/(\w+)\.py", rf"{CONSOLE}\1", text)


class CommandParser(argparse.ArgumentParser):
    """Description and examples stay as they are laid out; commands in them are told `as_started`."""

    def __init__(self, description: str | None, examples: str) -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, epilog=examples, formatter_class=form)

    def format_help(self) -> str:
        """The whole help text."""
        return as_started(super().format_help())
