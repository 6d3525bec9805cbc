"""The hosts that a launcher says it starts processes on, so that one that never comes has a name."""

from __future__ import annotations

import base64
import itertools
import json
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

# A comma outside of brackets separates hosts: gpu[01-03,07],login
_ENTRIES = re.compile(r"(?:[^,\[]|\[[^\]]*\])+")
_BRACKETS = re.compile(r"\[([^\]]*)\]")


def expected_hosts(launcher: str, environment: Mapping[str, str] = os.environ) -> list[str]:
    """The hosts of this run as its launcher names them; none if it does not say."""
    if launcher == "srun":
        return expand_hosts(environment.get("SLURM_STEP_NODELIST", ""))
    if "CROSS_RANK" in environment:  # set by deepspeed's launcher on each host, whose command names them all
        try:
            return deepspeed_hosts(Path(f"/proc/{os.getppid()}/cmdline").read_text())
        except OSError:
            pass
    return []


def deepspeed_hosts(command: str) -> list[str]:
    """The hosts in the command line of `deepspeed.launcher.launch`, words separated by NUL."""
    found = re.search(r"--world_info[=\0]([\w=-]+)", command)
    try:
        return list(json.loads(base64.urlsafe_b64decode(found[1]))) if found else []
    except ValueError:
        return []


def expand_hosts(nodes: str) -> list[str]:
    """The names in a SLURM node list such as `gpu[03-07]`, by SLURM itself where it is there.

    In a container it is not; then lists in brackets are read here.
    """
    try:
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True)
        if listed.returncode == 0 and listed.stdout:
            return listed.stdout.split()
    except OSError:
        pass
    return [host for entry in _ENTRIES.findall(nodes) for host in _expand(entry)]


def short(host: str) -> str:
    """A host's name without its domain, as launchers and hosts themselves differ in giving it."""
    return host if host.replace(".", "").isdigit() else host.partition(".")[0]


def _expand(entry: str) -> list[str]:
    pieces = _BRACKETS.split(entry)  # by turns: text, what was in brackets, text, ...
    choices = [_numbers(piece) if place % 2 else [piece] for place, piece in enumerate(pieces)]
    return ["".join(choice) for choice in itertools.product(*choices)]


def _numbers(ranges: str) -> list[str]:
    found = []
    for each in ranges.split(","):
        first, _, last = each.partition("-")
        numbers = range(int(first), int(last or first) + 1)
        found += [str(number).zfill(len(first)) for number in numbers]
    return found
