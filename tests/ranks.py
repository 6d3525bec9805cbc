"""Run a function on several gloo ranks of this machine, quickly.

Ranks are forked from a server that has imported torch, DeepSpeed and megatron-core once, so a test that
starts four of them pays tenths of a second, not the half minute of their imports.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

from megatron_tokenformer.config.schema import Parallel
from megatron_tokenformer.parallel.environment import find_processes

PRELOADED = ["tests.preload"]
TIMEOUT_S = 300


def _free_ports() -> Iterator[int]:
    """TCP ports below those that the system gives to connections, so that none takes one meanwhile."""
    lowest, count = 10_000, 20_000
    for number in itertools.count(os.getpid() * 101):  # processes that test at once begin far apart
        with socket.socket() as probe:
            try:
                probe.bind(("", lowest + number % count))
            except OSError:
                continue
        yield lowest + number % count


_ports = _free_ports()
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, **layout: Any) -> list[Any]:
    """Call `function(layout, *arguments)` on each rank; return the ranks' results in order.

    Args:
        function: at the top level of a module, so that it can be sent.
        layout: keys of the `parallel` section of a config.

    Raises:
        AssertionError: a rank raised (its traceback is the message), died, or did not end.
    """
    port = next(_ports)
    parallel = Parallel(**{"timeout_minutes": 1.0, **layout})
    pipes, processes = [], []
    for rank in range(world_size):
        mine, theirs = _context.Pipe()
        process = _context.Process(
            target=_rank, args=(theirs, rank, world_size, port, parallel, function, arguments), daemon=True
        )
        process.start()
        theirs.close()
        pipes.append(mine)
        processes.append(process)
    try:
        return [_receive(rank, pipe) for rank, pipe in enumerate(pipes)]
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()


def _receive(rank: int, pipe: Connection) -> Any:
    if not wait([pipe], TIMEOUT_S):
        raise AssertionError(f"rank {rank} did not end within {TIMEOUT_S} s")
    try:
        result, failure = pipe.recv()
    except EOFError:
        raise AssertionError(f"rank {rank} died") from None
    if failure:
        raise AssertionError(f"rank {rank} failed:\n{failure}")
    return result


def _rank(
    pipe: Connection,
    rank: int,
    world_size: int,
    port: int,
    parallel: Parallel,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    import torch

    from megatron_tokenformer.parallel import layout

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        here = layout.start(parallel, find_processes())
        pipe.send((function(here, *arguments), None))
        layout.stop()
    except BaseException:
        pipe.send((None, traceback.format_exc()))
    # Until the other end closes: a tensor that was sent is fetched from this process.
    pipe.poll(TIMEOUT_S)
