"""How every benchmark ends: its table, and with --json its figures with what they were measured on."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """The option --json, whose value `report` takes; a FILE in no folder is refused before any work."""
    what = "also write the figures as one JSON object to FILE, or without FILE as the last line"
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", type=_json_file, help=what)


def _json_file(name: str) -> str:
    if Path(name).is_dir():
        raise argparse.ArgumentTypeError(f"{name} is a folder; name a file")
    if not Path(name).parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {Path(name).parent} to write {name} to")
    return name


def at_least_one(text: str) -> int:
    """The type of options that count something, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """The option --device, whose value is a device that this torch can compute on."""
    parser.add_argument("--device", default="cpu", type=_device, help="cpu, cuda or cuda:1 (default: cpu)")


def _device(name: str) -> str:
    if name == "cpu":
        return name
    import torch  # here: not every benchmark needs it

    if not re.fullmatch(r"cuda(:\d+)?", name):
        raise argparse.ArgumentTypeError(f"{name!r} is none of cpu, cuda, cuda:1")
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(name.partition(":")[2] or 0) >= here:
        raise argparse.ArgumentTypeError(f"there is no {name}: torch sees {here} GPU(s)")
    return name


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
