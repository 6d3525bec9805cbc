"""Every process signs a list on the first one's host, so that those which do not come have names.

torch's own meeting only counts: it says how many are missing, and not which.
"""

from __future__ import annotations

import json
import os
import socket
import time
from datetime import timedelta

import torch.distributed as dist

from megatron_tokenformer.errors import UserError
from megatron_tokenformer.parallel.environment import Processes
from megatron_tokenformer.parallel.hosts import expected_hosts, short
from megatron_tokenformer.parallel.placement import ranges

PROGRESS_S = 30.0
"""between two lines about who is still missing"""
_LOOK_S = 0.05
_MARGIN = timedelta(seconds=20)
"""that others give the first process beyond its own patience, so that its answer reaches them"""


def open_store(processes: Processes, patience: timedelta) -> dist.Store:
    """The key-value store of the run, on the host of rank 0, where torchrun has one already.

    Raises:
        UserError: rank 0 cannot listen there, or this rank cannot reach it.
    """
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = processes.rank == 0 and not agents
    address, port = processes.master_address, processes.master_port
    try:
        # torch's meeting in this process takes the same server (multi_tenant).
        store = dist.TCPStore(
            address, port, None, serves, patience, wait_for_workers=False, multi_tenant=not agents
        )
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise UserError(_no_store(processes, serves, patience, error), exit_code=1) from None
    # A restart by torchrun meets in the same store.
    return dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def roll_call(store: dist.Store, processes: Processes, patience: timedelta, device: str) -> list[str]:
    """Wait until every rank has signed; the hosts of all ranks, in order.

    Args:
        device: this rank's `device_kind`.

    Raises:
        UserError: names the ranks and hosts that did not come, or have no GPU where others do, or one that
            came twice; on every rank.
    """
    rank, host = processes.rank, socket.gethostname()
    if store.add(f"signatures/{rank}", 1) > 1:
        other = store.get(f"host/{rank}").decode()
        twice = f"two processes are rank {rank}, on {other} and on {host}; give each host its own node rank"
        store.set("answer", json.dumps({"error": twice}))
    else:
        store.set(f"device/{rank}", device)
        store.set(f"host/{rank}", host)
        store.add("arrived", 1)
    if rank == 0:
        _await_all(store, processes, patience)
    try:
        store.wait(["answer"], patience + _MARGIN)
        answer = json.loads(store.get("answer"))
    except (dist.DistError, RuntimeError):
        raise UserError(
            f"the process at {processes.master_address}:{processes.master_port} that all ranks meet at has "
            f"ended, or does not answer; see what rank 0 said",
            exit_code=1,
        ) from None
    if "error" in answer:
        raise UserError(answer["error"], exit_code=1, everywhere=True)
    hosts: list[str] = answer["hosts"]
    return hosts


def _await_all(store: dist.Store, processes: Processes, patience: timedelta) -> None:
    """Rank 0: give the answer when all are here, or when patience is at its end."""
    world, begun = processes.world_size, time.monotonic()
    told = begun
    while not store.check(["answer"]):
        now = time.monotonic()
        if store.add("arrived", 0) == world:
            hosts, kinds = (
                [store.get(f"{what}/{rank}").decode() for rank in range(world)] for what in ("host", "device")
            )
            error = _mixture(kinds, hosts)
            store.set("answer", json.dumps({"error": error} if error else {"hosts": hosts}))
        elif now - begun > patience.total_seconds():
            missing = _missing(store, processes)
            store.set("answer", json.dumps({"error": f"after {now - begun:.0f} s {missing}"}))
        elif now - told > PROGRESS_S:
            told = now
            print(f"waiting: after {now - begun:.0f} s {_missing(store, processes)}", flush=True)
        time.sleep(_LOOK_S)


def _mixture(kinds: list[str], hosts: list[str]) -> str | None:
    """What to say if some ranks have a GPU and others none: each would wait for the others in its own way."""
    without = [rank for rank, kind in enumerate(kinds) if kind == "cpu"]
    if len(without) in (0, len(kinds)):
        return None
    where = ", ".join(dict.fromkeys(hosts[rank] for rank in without))
    return (
        f"rank {ranges(without)} on {where} finds no GPU, and other ranks do; see what nvidia-smi says "
        f"there, or export DS_ACCELERATOR=cpu for all"
    )


def _missing(store: dist.Store, processes: Processes) -> str:
    world = range(processes.world_size)
    here = {rank: store.get(f"host/{rank}").decode() for rank in world if store.check([f"host/{rank}"])}
    absent = [rank for rank in world if rank not in here]
    known = {short(host) for host in here.values()}
    silent = [host for host in expected_hosts(processes.launcher) if short(host) not in known]
    nobody = f" (nothing came from {', '.join(silent)})" if silent else ""
    came = "; ".join(
        f"{host} with rank {ranges(rank for rank, its in here.items() if its == host)}"
        for host in dict.fromkeys(here.values())
    )
    return (
        f"{len(absent)} of {processes.world_size} processes have not come: rank {ranges(absent)}{nobody}; "
        f"here are {came}"
    )


def _no_store(processes: Processes, serves: bool, patience: timedelta, error: Exception) -> str:
    address, port = processes.master_address, processes.master_port
    if serves and "EADDRINUSE" in str(error):
        host = socket.gethostname()
        return f"port {port} of {host} is in use, perhaps by another run; export another MASTER_PORT"
    try:
        socket.getaddrinfo(address, port)
    except OSError:
        return (
            f"{socket.gethostname()} does not know the host '{address}'; export a MASTER_ADDR that it knows"
        )
    within = f"within {patience.total_seconds():.0f} s"
    return (
        f"{socket.gethostname()} did not reach rank 0 at {address}:{port} {within}: it has not started, or "
        f"ended, or a firewall is between them"
    )
