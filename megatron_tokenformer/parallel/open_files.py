"""How many files and connections a process may have open."""

from __future__ import annotations

import resource

from megatron_tokenformer.parallel.environment import Processes

AMPLE = 65_536
OF_EACH_RANK = 4
"""connections that rank 0 has with every other: the meeting's, the news of its end, two groups of gloo"""
OF_ITS_OWN = 512
"""data, shards, libraries"""


def allow_open_files(processes: Processes) -> None:
    """Raise this process's limit as far as it may, and say so where that is not enough for the run.

    The usual one, 1,024, is for programs that wait in select(); rank 0 passes it at some 250 ranks.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    bound = AMPLE if hard == resource.RLIM_INFINITY else min(hard, AMPLE)
    if soft != resource.RLIM_INFINITY and soft < bound:
        resource.setrlimit(resource.RLIMIT_NOFILE, (bound, hard))
    wanted = OF_EACH_RANK * processes.world_size + OF_ITS_OWN
    if processes.rank == 0 and hard != resource.RLIM_INFINITY and hard < wanted:
        print(
            f"warning: this process may have {hard} files and connections open, and may need {wanted} with "
            f"{processes.world_size} ranks; raise the hard limit (ulimit -Hn)",
            flush=True,
        )
