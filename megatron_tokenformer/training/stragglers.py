"""Which rank is slower than its peers.

Ranks wait for each other in every step, so a step takes equally long on all of them.  What tells them apart
is their own work: waiting for data, the forward and the backward pass, as `phases.py` measures them.  Under
tensor parallelism both passes wait too, so all ranks of a slow one's group look slow, and all are named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median_low

import torch
import torch.distributed as dist

from megatron_tokenformer.parallel.layout import Layout
from megatron_tokenformer.training.run import Run

OWN_WORK = ("data_time_s", "forward_time_s", "backward_time_s")
NOTICEABLE = 0.05
"""of a step: what is lost beside the peers and less than this is not worth a line"""


def tell_stragglers(run: Run, times: Mapping[str, float]) -> dict[str, float]:
    """Name the ranks that were slow in the steps since the last log line, with their hosts.

    Returns:
        What the log's row says of the slowest, if there is one.
    """
    layout = run.layout
    own = gather_own_times(times, layout)
    stages = [layout.topology.filter_match(pipe=stage) for stage in range(layout.pipeline_size)]
    found = find_stragglers(own, stages, times["step_time_s"], run.config.training.straggler_factor)
    for rank, usual in found.items():
        run.log.say(
            f"warning: rank {rank} on {layout.hosts[rank]} is slow: {own[rank] * 1000:,.0f} ms of a step are "
            f"its own work, {usual * 1000:,.0f} ms its peers'"
        )
    if not found:
        return {}
    rank = max(found, key=lambda rank: own[rank])
    return {"straggler": rank, "straggler_time_s": own[rank], "peers_time_s": found[rank]}


def gather_own_times(times: Mapping[str, float], layout: Layout) -> list[float]:
    """Seconds of a step that each rank worked by itself; on every rank."""
    mine = torch.tensor([sum(times.get(name, 0.0) for name in OWN_WORK)], device=layout.device)
    everyone = torch.empty(layout.processes.world_size, device=layout.device)
    dist.all_gather_into_tensor(everyone, mine)
    found: list[float] = everyone.tolist()
    return found


def find_stragglers(
    own: Sequence[float], stage_ranks: Sequence[Sequence[int]], step_time: float, factor: float
) -> dict[int, float]:
    """The slow ranks, each with the median of its peers.

    Args:
        own: seconds of each rank.
        stage_ranks: the ranks of each pipeline stage: they do the same work, and are peers.  Where a stage is
            one rank, all ranks are peers, as stages are cut to equal work.
        step_time: seconds of a step.
    """
    alone = all(len(ranks) == 1 for ranks in stage_ranks)
    peers = [[rank for ranks in stage_ranks for rank in ranks]] if alone else stage_ranks
    slow: dict[int, float] = {}
    for group in peers:
        usual = median_low([own[rank] for rank in group])
        slow |= {
            rank: usual
            for rank in group
            if own[rank] > factor * usual and own[rank] - usual > NOTICEABLE * step_time
        }
    return slow
