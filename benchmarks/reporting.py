"""How every benchmark ends: its table, and with --json its figures with what they were measured on."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """The option --json, whose value `report` takes."""
    what = "also write the figures as one JSON object to FILE, or without FILE as the last line"
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help=what)


def settings(given: argparse.Namespace) -> dict[str, Any]:
    """The command line, for the figures: all of it but where things went."""
    return {key: value for key, value in vars(given).items() if key not in ("json", "folder", "one")}


def report(table: str, figures: dict[str, Any], to: str | None, device: str = "cpu") -> None:
    """Print the table, and give out the figures with hardware, versions and commit.

    Args:
        to: what --json was given: a file, `-` for standard output, or None for neither.
        device: that was measured, as torch names it.
    """
    print(table)
    if to is None:
        return
    told = {"environment": describe(device), **figures}
    if to == "-":
        print(json.dumps(told))
    else:
        Path(to).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def describe(device: str = "cpu") -> dict[str, Any]:
    """Hardware, versions, commit and date.  Imports no torch where the benchmark has not."""
    torch = sys.modules.get("torch")
    on_gpu = torch is not None and device.startswith("cuda")
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"{_processor()}, no GPU",
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads() if torch is not None else None,
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "triton": version("triton") if importlib.util.find_spec("triton") else None,
        "commit": commit or None,
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), "unknown")
