"""Who does not come has a name, and so has who comes twice; every rank learns it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from megatron_tokenformer.errors import UserError
from megatron_tokenformer.parallel import roll_call
from megatron_tokenformer.parallel.environment import Processes, free_port


def call(port: int, rank: int, world: int, seconds: float, device: str = "cpu") -> list[str]:
    me = Processes("srun", rank, rank, world, "127.0.0.1", port)
    store = roll_call.open_store(me, timedelta(seconds=20))
    return roll_call.roll_call(store, me, timedelta(seconds=seconds), device)


@pytest.fixture
def callers() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as threads:
        yield threads


def test_all_ranks_learn_the_hosts(callers: ThreadPoolExecutor) -> None:
    port = free_port()
    calls = [callers.submit(call, port, rank, 3, 60.0) for rank in (2, 0, 1)]
    assert [each.result() for each in calls] == [[socket.gethostname()] * 3] * 3


def test_who_is_missing_is_named_with_its_host(
    callers: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here, port = socket.gethostname(), free_port()
    monkeypatch.setenv("SLURM_STEP_NODELIST", f"{here},gpu[07-08]")
    monkeypatch.setattr(roll_call, "PROGRESS_S", 0.1)
    calls = [callers.submit(call, port, rank, 6, 0.5) for rank in (0, 1)]
    for each in calls:
        with pytest.raises(UserError) as failure:
            each.result()
        assert str(failure.value).endswith(
            f"s 4 of 6 processes have not come: rank 2-5 (nothing came from gpu07, gpu08); "
            f"here are {here} with rank 0-1"
        )
        assert (failure.value.exit_code, failure.value.everywhere) == (1, True)
    assert "waiting: after 0 s 4 of 6 processes have not come: rank 2-5" in capsys.readouterr().out


def test_a_rank_that_comes_twice_is_named(callers: ThreadPoolExecutor) -> None:
    port = free_port()
    calls = [callers.submit(call, port, rank, 4, 60.0) for rank in (0, 1, 1)]
    for each in calls:
        with pytest.raises(UserError, match=r"two processes are rank 1, on \S+ and on \S+; give each host"):
            each.result()


def test_ranks_without_a_gpu_among_others_are_named(callers: ThreadPoolExecutor) -> None:
    port = free_port()
    devices = ["cuda", "cpu", "cuda", "cpu"]
    calls = [callers.submit(call, port, rank, 4, 60.0, device) for rank, device in enumerate(devices)]
    for each in calls:
        with pytest.raises(
            UserError, match=r"^rank 1, 3 on \S+ finds no GPU, and other ranks do; see"
        ) as told:
            each.result()
        assert told.value.everywhere


def test_who_cannot_reach_the_first_says_where_it_looked() -> None:
    port = free_port()
    me = Processes("srun", 1, 1, 2, "127.0.0.1", port)
    with pytest.raises(UserError, match=rf"did not reach rank 0 at 127\.0\.0\.1:{port} within 1 s"):
        roll_call.open_store(me, timedelta(seconds=1))


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        me = Processes("srun", 0, 0, 2, "127.0.0.1", port)
        with pytest.raises(UserError, match=f"port {port} of .* is in use.*; export another MASTER_PORT"):
            roll_call.open_store(me, timedelta(seconds=5))
