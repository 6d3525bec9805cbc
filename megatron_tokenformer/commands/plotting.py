"""What the two commands that plot have in common: their options, and where they write."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_tokenformer.commands.command_line import CommandParser
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.evaluation.charts import Chart
from megatron_tokenformer.evaluation.curves import Curve
from megatron_tokenformer.evaluation.page import write_page
from megatron_tokenformer.evaluation.picture import FORMATS, draw

PAGE = ".html"


def plot_parser(description: str | None, epilog: str) -> argparse.ArgumentParser:
    """The options of both commands."""
    parser = CommandParser(description, epilog)
    add = parser.add_argument
    add("folders", nargs="+", metavar="RUN_DIR", help="a run's folder, or a schedule's (its stages in order)")
    add(
        "--output",
        action="append",
        type=Path,
        metavar="FILE",
        help="as .png, .pdf, .svg or .html; repeatable",
    )
    add("--html", action="store_true", help="also write the page beside the picture, as FILE.html")
    add(
        "--label",
        action="append",
        default=[],
        metavar="NAME",
        help="of a folder, in order (default: its name)",
    )
    add("--title", default="", help="above the chart")
    return parser


def outputs(given: argparse.Namespace, default: Path) -> list[Path]:
    """The files to write.

    Raises:
        UserError: a name whose ending is no format.
    """
    paths: list[Path] = given.output or [default]
    if given.html:
        paths = [*paths, *(path.with_suffix(PAGE) for path in paths)]
    for path in paths:
        if path.suffix.lower() not in (*FORMATS, PAGE):
            raise UserError(f"{path} does not end in one of {', '.join((*FORMATS, PAGE))}")
    return list(dict.fromkeys(paths))


def write(chart: Chart, curves: Sequence[Curve], paths: Sequence[Path]) -> None:
    """Write a chart into each file, as its ending says.

    Raises:
        UserError: nothing to draw, or a picture without matplotlib.
    """
    if not chart.panels:
        names = ", ".join(curve.label for curve in curves)
        raise UserError(f"there is nothing to draw of {names}: metrics.jsonl has no rows of this kind (yet)")
    for path in paths:
        if path.suffix.lower() == PAGE:
            write_page(chart, curves, path)
        else:
            draw(chart, path)
        print(f"written to {path}")
