"""Training on several hosts without a scheduler: deepspeed over ssh and pdsh, torchrun on each host."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts

PRETRAIN = ["-m", "megatron_tokenformer.training.pretrain", "--config"]
LONG = ["training.steps=100000", "training.eval_steps=0", "parallel.timeout_minutes=5"]
MINUTE = 60.0


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    path = tmp_path / "hosts"
    path.write_text("n1 slots=1\nn2 slots=1\n")
    return path


@pytest.fixture(autouse=True)
def nothing_left(hosts: Hosts) -> Iterator[None]:
    """A test that fails leaves no run to the next one."""
    yield
    hosts.clear("training.pretrain")


def wait_for(log: Path, pattern: str, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not re.search(pattern, log.read_text()):
        assert time.monotonic() < deadline, f"no {pattern!r} in:\n{log.read_text()[-5000:]}"
        time.sleep(0.2)


def test_deepspeed_on_the_hosts_of_a_file(hosts: Hosts, config: Path, hostfile: Path) -> None:
    script = "examples/deepspeed/many_nodes.sh"
    said = hosts.run("login", script, config, "parallel.tensor=2", HOSTFILE=hostfile)
    assert "2 processes on 2 host(s), started by torchrun or deepspeed: tensor 2" in said
    assert "n1: rank 0 (pipeline stage 0, data 0, tensor 0)" in said
    assert "n2: rank 1 (pipeline stage 0, data 0, tensor 1)" in said
    assert "warning: tensor-parallel ranks 0-1 are on different hosts (n1, n2)" in said
    assert (config.parent / "run/finished.json").exists()


def test_deepspeed_on_one_node(hosts: Hosts, config: Path) -> None:
    said = hosts.run("n1", "examples/deepspeed/one_node.sh", config, "training.steps=2", GPUS=2)
    assert "2 processes on 1 host(s)" in said
    assert "warning: tensor-parallel" not in said
    assert (config.parent / "run/finished.json").exists()


def test_torchrun_on_each_host(hosts: Hosts, config: Path, tmp_path: Path) -> None:
    words = ["torchrun", "--nnodes=2", "--nproc-per-node=1", "--master-addr=n1", "--master-port=29600"]
    first = hosts.start("n1", *words, "--node-rank=0", *PRETRAIN, config, log=tmp_path / "n1.log")
    hosts.run("n2", *words, "--node-rank=1", *PRETRAIN, config)
    assert first.wait(60) == 0
    assert "2 processes on 2 host(s)" in (tmp_path / "n1.log").read_text()
    assert (config.parent / "run/finished.json").exists()


@pytest.mark.parametrize("killed", ["rank", "cable"])
def test_one_rank_less_ends_the_others_within_a_minute(
    hosts: Hosts, config: Path, hostfile: Path, tmp_path: Path, killed: str
) -> None:
    """deepspeed waits for all hosts, whatever becomes of one: the ranks end themselves."""
    log = tmp_path / "log"
    script = "examples/deepspeed/many_nodes.sh"
    job = hosts.start("login", script, config, *LONG, HOSTFILE=hostfile, log=log)
    wait_for(log, r"step +3/")
    since = time.monotonic()
    try:
        if killed == "rank":
            hosts.kill("n2", "-u -m megatron_tokenformer.training.pretrain", signal.SIGKILL)
            why = "error: rank 1 on n2: it ended without a word: killed, or see above for what it said"
        else:
            hosts.unplug("n2")
            why = "error: rank 1 on n2: its host does not answer any more"
        wait_for(log, why, MINUTE)
        assert job.wait(MINUTE) != 0
        assert not hosts.find("n1", "-m megatron_tokenformer") + hosts.find("n2", "-m megatron_tokenformer")
        assert time.monotonic() - since < 2 * MINUTE
    finally:
        hosts.plug("n2")
    assert "Traceback" not in log.read_text().partition(why)[0]


def test_a_host_that_never_comes_is_named(hosts: Hosts, config: Path, hostfile: Path) -> None:
    hosts.unplug("n2")
    try:
        done = hosts.attempt(
            "login",
            "examples/deepspeed/many_nodes.sh",
            config,
            "parallel.join_minutes=0.3",
            HOSTFILE=hostfile,
            seconds=180,
        )
    finally:
        hosts.plug("n2")
    assert done.returncode != 0
    assert (
        "1 of 2 processes have not come: rank 1 (nothing came from n2); here are n1 with rank 0"
        in done.stdout
    )
