"""Ranks may open as many connections as a large run needs, or hear that they may not."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from megatron_tokenformer.parallel.environment import Processes
from megatron_tokenformer.parallel.open_files import allow_open_files
resource.setrlimit(resource.RLIMIT_NOFILE, (256, int(sys.argv[1])))
allow_open_files(Processes("srun", int(sys.argv[3]), 0, int(sys.argv[2]), "h", 1))
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.mark.parametrize("rank, world, warned", [(0, 4, False), (0, 1000, True), (1, 1000, False)])
def test_the_soft_limit_becomes_the_hard_one(rank: int, world: int, warned: bool) -> None:
    hard = min(2048, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    command = [sys.executable, "-c", PROGRAM, str(hard), str(world), str(rank)]
    *said, limit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert int(limit) == hard
    words = (
        f"warning: this process may have {hard} files and connections open, and may need 4512 with 1000 ranks"
    )
    assert [line.startswith(words) for line in said] == [True] * warned
