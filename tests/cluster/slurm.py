"""A real SLURM on pretend hosts: its controller on the first, a node on each of the others."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.cluster.hosts import Hosts

# Claims that real batch headers fit in.  Jobs are told to end 10 s before they are killed, and one that is
# requeued starts anew after a few seconds rather than two minutes.
CONF = """\
ClusterName=pretend
SlurmctldHost={controller}
SlurmUser=root
SlurmdUser=root
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=2,batch_sched_delay=0,sched_min_interval=100000
GresTypes=gpu
MpiDefault=none
ReturnToService=2
KillWait=10
SlurmdTimeout=30
MinJobAge=3600
NodeName={nodes} CPUs=64 Sockets=1 CoresPerSocket=64 RealMemory=500000 Gres=gpu:8 State=UNKNOWN
PartitionName=main Nodes={nodes} Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """SLURM on hosts, whose folder must hold `slurm/` when they are made (`prepare`).

    Args:
        hosts: the first is the one that jobs are submitted from.
    """

    def __init__(self, hosts: Hosts) -> None:
        self.hosts, self.login, self.nodes = hosts, hosts.names[0], hosts.names[1:]
        folder = hosts.folder
        for host in hosts.names:
            self._daemon(host, "munged", "--foreground", "--force", f"--key-file={folder}/munge.key")
        self._daemon(self.login, "slurmctld", "-D")
        for node in self.nodes:
            self._daemon(node, "slurmd", "-D", "-N", node)
        self.wait(
            lambda: self.query("sinfo", "-h", "-N", "-o", "%t").split().count("idle") == len(self.nodes), 60
        )

    def is_idle(self) -> bool:
        """Whether every node is up and without a job."""
        states = self.query("sinfo", "-h", "-N", "-o", "%t").split()
        return states.count("idle") == len(self.nodes)

    def query(self, *words: object) -> str:
        """What a command on the login host prints, whatever its exit code."""
        return self.hosts.attempt(self.login, *words, seconds=30).stdout

    def submit(self, *words: object, **given: Any) -> str:
        """Submit a job by sbatch; its id."""
        return self.hosts.run(self.login, "sbatch", "--parsable", *words, **given).strip()

    def state(self, job: str) -> str:
        """A job's state; of an array those of its tasks, in lines."""
        return self.query("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%T").strip()

    def facts(self, job: str) -> dict[str, str]:
        """What `scontrol show job` tells."""
        words = self.query("scontrol", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, job: str, state: str, seconds: float = 240) -> None:
        """Wait until a job, and each of an array's, is in a state.

        Raises:
            AssertionError: with the job's facts, if it ends in another.
        """
        ends = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}

        def reached() -> bool:
            states = set(self.state(job).split())
            assert not (states & ends - {state}), self.query("scontrol", "show", "job", job)
            return states == {state}

        self.wait(reached, seconds)

    def wait(self, done: Callable[[], bool], seconds: float) -> None:
        """Wait until a condition holds.

        Raises:
            AssertionError: with the queue, if it does not in time.
        """
        deadline = time.monotonic() + seconds
        while not done():
            if time.monotonic() > deadline:
                told = self.query("squeue", "-l") + self.query("sinfo", "-N", "-l")
                raise AssertionError(f"waited {seconds:.0f} s\n{told}")
            time.sleep(0.5)

    def _daemon(self, host: str, *words: str) -> None:
        folder = self.hosts.folder
        self.hosts.start(host, *words, log=folder / f"{host}.{words[0]}.log")


def prepare(folder: Path, names: list[str]) -> None:
    """Write what SLURM reads, before the hosts are made that find it in /etc/slurm."""
    (folder / "slurm").mkdir(parents=True)
    (folder / "state").mkdir()
    nodes = ",".join(names[1:])
    (folder / "slurm/slurm.conf").write_text(CONF.format(controller=names[0], folder=folder, nodes=nodes))
    for number in range(8):
        (folder / f"gpu{number}").touch()
    (folder / "slurm/gres.conf").write_text(f"NodeName={nodes} Name=gpu File={folder}/gpu[0-7]\n")
    (folder / "slurm/cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    key = folder / "munge.key"
    key.touch(mode=0o400)
    key.chmod(0o600)
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
