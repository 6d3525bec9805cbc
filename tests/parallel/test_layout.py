"""Who is where: launchers' variables, coordinates, groups and their time-outs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_tokenformer.errors import UserError
from megatron_tokenformer.parallel.environment import find_processes
from megatron_tokenformer.parallel.layout import Layout, each_rank, from_main_rank, on_main_rank
from megatron_tokenformer.training.engine import build_engine
from tests.ranks import run_ranks
from tests.toy import toy_config


def coordinates(layout: Layout) -> tuple[int, int, int, list[int]]:
    return (
        layout.pipeline_rank,
        layout.data_rank,
        layout.tensor.rank,
        dist.get_process_group_ranks(layout.tensor.group),
    )


def test_tensor_ranks_are_neighbours_then_data_then_pipeline() -> None:
    found = run_ranks(8, coordinates, tensor=2, pipeline=2)
    assert [place[:3] for place in found] == [
        (pipe, data, tensor) for pipe in (0, 1) for data in (0, 1) for tensor in (0, 1)
    ]
    assert [place[3] for place in found[::2]] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def timeouts(layout: Layout, folder: Path) -> list[float]:
    """Of all groups that this rank is in."""
    build_engine(toy_config(folder, parallel={"pipeline": 2}), layout, accumulation=4)
    cpu, groups = torch.device("cpu"), dist.distributed_c10d._world.pg_map
    return [group._get_backend(cpu).options._timeout.total_seconds() for group in groups]


def test_every_group_has_the_timeout_of_the_config(tmp_path: Path) -> None:
    toy_config(tmp_path)
    for found in run_ranks(4, timeouts, tmp_path, timeout_minutes=2.0, pipeline=2):
        assert len(found) > 10, "DeepSpeed's, with that of tied weights, and megatron-core's"
        assert set(found) == {120.0}


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, ("no launcher", 0, 0, 1)),
        (
            {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "h", "MASTER_PORT": "1"},
            ("torchrun or deepspeed", 5, 1, 8),
        ),
        (
            {
                "SLURM_PROCID": "3",
                "SLURM_LOCALID": "1",
                "SLURM_STEP_NUM_TASKS": "4",
                "SLURM_STEP_NODELIST": "n[1-2]",
                "SLURM_JOB_ID": "77",
                "MASTER_ADDR": "n1",
            },
            ("srun", 3, 1, 4),
        ),
        (
            {
                "OMPI_COMM_WORLD_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
                "PMIX_NAMESPACE": "job",
            },
            ("mpirun", 1, 1, 2),
        ),
        # A shell inside an allocation has the variables of a task that it is not.
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "4"}, ("no launcher", 0, 0, 1)),
    ],
)
def test_launchers_are_recognised(environment: dict[str, str], expected: tuple[str, int, int, int]) -> None:
    found = find_processes(environment)
    assert (found.launcher, found.rank, found.local_rank, found.world_size) == expected


def test_steps_of_slurm_meet_on_their_first_host_and_at_ports_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    task = {
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_NODELIST": "n[04-05]",
    }
    found = [
        find_processes({**task, "SLURM_JOB_ID": job, "SLURM_STEP_ID": step})
        for job, step in (("7", "0"), ("7", "1"), ("70", "1"), ("7", "0"))
    ]
    assert {each.master_address for each in found} == {"n04"}
    ports = [each.master_port for each in found]
    assert ports[0] == ports[3]
    assert len(set(ports)) == 3
    assert all(10_000 <= port < 30_000 for port in ports)


@pytest.mark.parametrize("given, missing", [({}, "MASTER_ADDR"), ({"MASTER_ADDR": "h"}, "MASTER_PORT")])
def test_a_missing_meeting_place_is_said(given: dict[str, str], missing: str) -> None:
    with pytest.raises(UserError, match=f"RANK but not {missing}"):
        find_processes({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", **given})


def decide(layout: Layout, mistake: bool) -> str:
    def answer() -> str:
        if mistake:
            raise UserError("told once", exit_code=2)
        return f"rank {layout.rank}"

    try:
        return from_main_rank(answer)
    except UserError as error:
        return f"{error}, code {error.exit_code}"


@pytest.mark.parametrize("mistake, answer", [(False, "rank 0"), (True, "told once, code 2")])
def test_what_the_main_rank_decides_all_ranks_learn(mistake: bool, answer: str) -> None:
    assert run_ranks(2, decide, mistake) == [answer] * 2


def keep(layout: Layout, fails: list[int]) -> tuple[int, bool] | str:
    """What this rank has afterwards of a result that cannot be sent, or the mistake that all learn."""

    def act() -> Callable[[], int]:
        if layout.rank in fails:
            raise UserError("no disk")
        return lambda: layout.rank

    try:
        return each_rank(act)(), on_main_rank(act) is None
    except UserError as error:
        assert error.everywhere
        return str(error)


def test_a_rank_keeps_what_it_has_and_learns_who_failed() -> None:
    assert run_ranks(2, keep, []) == [(0, False), (1, True)]
    first, second = run_ranks(2, keep, [1])
    assert first == second and re.fullmatch(r"rank 1 on \S+: no disk", first)
