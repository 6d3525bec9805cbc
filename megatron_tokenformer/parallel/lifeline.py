"""A TCP connection from every rank to rank 0, by which all learn at once that one has ended, and why.

Collectives alone do not tell: a rank that waits in one learns of a dead peer by its time-out, or from a
launcher, and not every launcher ends the ranks of other hosts.  The kernel closes the connection of a process
that dies in any way, and answers for one that is busy; a host that is gone it misses in half a minute.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from megatron_tokenformer.parallel.environment import Processes

if TYPE_CHECKING:  # what tells errors needs this module before torch is imported
    from torch.distributed import Store

GRACE_S = 15.0
"""that a rank has to end by itself, once another has"""
CONNECT_S = 10.0
HELLO_S = 2.0
"""that one who has connected has to say who he is"""
# A host that is silent so long is asked, so often; the sum is when it is given up.
_IDLE_S, _INTERVAL_S, _PROBES = 10, 5, 4


class Lifeline:
    """One end of the connections; a thread of its own reads it.

    Args:
        processes: who this process is.
        ends: open connections by the rank at the other end: rank 0 has all others, they have rank 0.
        hosts: of all ranks.
    """

    def __init__(self, processes: Processes, ends: dict[int, socket.socket], hosts: list[str]) -> None:
        self._rank, self._speaks = processes.rank, processes.local_rank == 0
        self._ends, self._hosts = ends, hosts
        self._lock = threading.Lock()
        self._closed = False
        self._bad_news = threading.Event()
        self._selector = selectors.DefaultSelector()
        for rank, end in ends.items():
            _keep_alive(end)
            self._selector.register(end, selectors.EVENT_READ, (rank, bytearray()))
        threading.Thread(target=self._listen, name="lifeline", daemon=True).start()

    def report(self, message: str) -> None:
        """Tell the other ranks that this one fails."""
        self._send({"rank": self._rank, "failed": message})

    def ends_because_of_another(self, patience: float) -> bool:
        """Whether another rank ended first, or is heard to within so many seconds."""
        return self._bad_news.wait(patience)

    def close(self) -> None:
        """Leave in good order: that this rank ends is no failure."""
        if not self._closed:
            self._send({"rank": self._rank, "done": True})

    def _send(self, message: dict[str, Any]) -> None:
        """Once: what a rank ends with is the last that it says."""
        with self._lock:
            if not self._closed:
                self._closed = True
                for end in list(self._ends.values()):
                    _write(end, message)

    def _listen(self) -> None:
        while self._ends:
            for key, _ in self._selector.select():
                message = _read(key.fileobj, *key.data)  # type: ignore[arg-type]
                if message is None:
                    continue
                self._selector.unregister(key.fileobj)
                del self._ends[key.data[0]]
                if "done" not in message and not self._closed:
                    self._fail(message)
                    return

    def _fail(self, message: dict[str, Any]) -> None:
        """Pass the news on, give the main thread time to end, then end the process."""
        self._bad_news.set()
        host = self._hosts[message["rank"]]
        for end in self._ends.values():
            _write(end, message)
        # One that could still speak did so itself, on its own host.
        if self._speaks and ("silent" in message or host != self._hosts[self._rank]):
            what = message.get("failed") or message["silent"]
            print(f"error: rank {message['rank']} on {host}: {what}", file=sys.stderr, flush=True)
        time.sleep(GRACE_S)
        os._exit(1)


_lifeline: Lifeline | None = None


def start(store: Store, processes: Processes, hosts: list[str]) -> None:
    """Connect all ranks with rank 0; where that is not possible, say so and go on without.

    Args:
        store: of the run, from `roll_call.open_store`.
        hosts: of all ranks, in order.
    """
    global _lifeline
    stop()
    ends = _accept(store, processes) if processes.rank == 0 else _connect(store, processes)
    if processes.rank == 0 and len(ends) < processes.world_size - 1:
        others = processes.world_size - 1
        print(
            f"warning: rank 0 has connections with {len(ends)} of {others} other ranks (does a "
            f"firewall close ports between hosts?); if one ends, a time-out alone may notice it",
            flush=True,
        )
    _lifeline = Lifeline(processes, ends, hosts)


def stop() -> None:
    """This rank ends, or begins another run, in good order."""
    global _lifeline
    if _lifeline is not None:
        _lifeline.close()
        _lifeline = None


def report(message: str) -> None:
    """Tell the other ranks, if there are any, that this one fails."""
    if _lifeline is not None:
        _lifeline.report(message)


def ends_because_of_another(patience: float) -> bool:
    """Whether another rank ended first, or is heard to within so many seconds."""
    return _lifeline is not None and _lifeline.ends_because_of_another(patience)


def _accept(store: Store, processes: Processes) -> dict[int, socket.socket]:
    """Rank 0: a connection from each other rank; a stranger does not know the word."""
    word = secrets.token_hex(16)
    ends: dict[int, socket.socket] = {}
    with socket.create_server(("", 0), backlog=processes.world_size) as server:
        place = {"port": server.getsockname()[1], "addresses": _addresses(processes), "word": word}
        store.set("lifeline", json.dumps(place))
        deadline = time.monotonic() + 2 * CONNECT_S
        while len(ends) < processes.world_size - 1:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                end, _ = server.accept()
            except OSError:
                break
            rank = _greeted(end, word)
            if rank is None:
                end.close()
            else:
                ends[rank] = end
    return ends


def _greeted(end: socket.socket, word: str) -> int | None:
    """The rank that has connected; None for a stranger.

    What comes behind the greeting stays in the connection: a rank may fail right after it.
    """
    end.settimeout(HELLO_S)
    said, deadline = b"", time.monotonic() + HELLO_S
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        while not said.endswith(b"\n") and time.monotonic() < deadline:
            if not (byte := end.recv(1)):
                return None
            said += byte
        hello = json.loads(said)
        return int(hello["rank"]) if hello["word"] == word else None
    return None


def _connect(store: Store, processes: Processes) -> dict[int, socket.socket]:
    place = json.loads(store.get("lifeline"))
    for address in [*place["addresses"], processes.master_address]:
        with contextlib.suppress(OSError):
            end = socket.create_connection((address, place["port"]), CONNECT_S)
            _write(end, {"rank": processes.rank, "word": place["word"]})
            return {0: end}
    return {}


def _addresses(processes: Processes) -> list[str]:
    """Where others may reach this host: the address that it reaches the meeting place from, and its name."""
    found = []
    with contextlib.suppress(OSError):
        with socket.create_connection((processes.master_address, processes.master_port), CONNECT_S) as probe:
            found.append(probe.getsockname()[0])
    # An own name in /etc/hosts is often a loopback address, which others would look for at home.
    outer = [address for address in found if not address.startswith("127.") and address != "::1"]
    return [*outer, socket.gethostname()]


def _keep_alive(end: socket.socket) -> None:
    end.settimeout(CONNECT_S)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_KEEPIDLE": _IDLE_S,
        "TCP_KEEPINTVL": _INTERVAL_S,
        "TCP_KEEPCNT": _PROBES,
        "TCP_USER_TIMEOUT": 1000 * (_IDLE_S + _INTERVAL_S * _PROBES),
    }
    for name, value in options.items():
        if hasattr(socket, name):  # not all are outside of Linux
            end.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _write(end: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        end.sendall(json.dumps(message).encode() + b"\n")


def _read(end: socket.socket, rank: int, held: bytearray) -> dict[str, Any] | None:
    """A whole message, or None if it is not whole yet; the end of a connection is one, too."""
    try:
        received = end.recv(65536)
    except TimeoutError as error:
        why = "its host does not answer any more" if error.errno else "nothing came"
        return {"rank": rank, "silent": why}
    except OSError as error:
        return {"rank": rank, "silent": f"its connection broke ({error.strerror})"}
    if not received:
        return {"rank": rank, "silent": "it ended without a word: killed, or see above for what it said"}
    held += received
    line, newline, _ = bytes(held).partition(b"\n")
    if not newline:
        return None
    try:
        message: dict[str, Any] = {**json.loads(line)}
    except (ValueError, TypeError, RecursionError):
        message = {"rank": rank, "silent": "it sent a message that is malformed"}
    return message


atexit.register(stop)
