"""The layout in words, and the names of hosts that launchers give."""

from __future__ import annotations

import base64
import json

import pytest

from megatron_tokenformer.config.schema import Parallel
from megatron_tokenformer.parallel import hosts
from megatron_tokenformer.parallel.placement import describe_placement, ranges


def test_every_host_has_its_ranks_and_their_parts() -> None:
    lines = describe_placement(["a"] * 4 + ["b"] * 4, Parallel(tensor=2, pipeline=2, sequence=True), "srun")
    assert lines == [
        "8 processes on 2 host(s), started by srun: tensor 2, pipeline 2, data 2, sequence parallel",
        "  a: rank 0-3 (pipeline stage 0, data 0-1, tensor 0-1)",
        "  b: rank 4-7 (pipeline stage 1, data 0-1, tensor 0-1)",
    ]


def test_tensor_parallel_ranks_on_different_hosts_are_warned_of() -> None:
    *_, warning = describe_placement(["a", "b"] * 4, Parallel(tensor=2), "mpirun")
    assert warning.startswith(
        "warning: tensor-parallel ranks 0-1 are on different hosts (a, b), and so are 3 more groups of them"
    )
    together = describe_placement(["a", "a", "b", "b"], Parallel(tensor=2), "mpirun")
    assert not any("warning" in line for line in together)


def test_many_hosts_are_not_all_listed() -> None:
    lines = describe_placement([f"n{rank}" for rank in range(100)], Parallel(), "srun")
    assert len(lines) == 18
    assert lines[-1] == "  and 84 more hosts"


def test_ranges() -> None:
    assert ranges([8, 0, 1, 3, 2]) == "0-3, 8"


@pytest.mark.parametrize(
    "nodes, expected",
    [
        ("n1", ["n1"]),
        ("gpu[08-10],login", ["gpu08", "gpu09", "gpu10", "login"]),
        ("a[1,3-4]-ib,b", ["a1-ib", "a3-ib", "a4-ib", "b"]),
        ("r[0-1]n[1-2]", ["r0n1", "r0n2", "r1n1", "r1n2"]),
        ("", []),
    ],
)
def test_node_lists_are_read_without_slurm(
    nodes: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert hosts.expand_hosts(nodes) == expected


def test_hosts_of_deepspeed_are_those_of_its_launcher() -> None:
    world = base64.urlsafe_b64encode(json.dumps({"a": [0, 1], "b": [0]}).encode()).decode()
    words = ["python", "-m", "deepspeed.launcher.launch", f"--world_info={world}", "--node_rank=1"]
    assert hosts.deepspeed_hosts("\0".join(words)) == ["a", "b"]
    assert hosts.deepspeed_hosts("python\0train.py") == []


def test_a_host_is_the_same_with_and_without_its_domain() -> None:
    assert hosts.short("a.cluster.net") == "a"
    assert hosts.short("10.0.0.2") == "10.0.0.2"
