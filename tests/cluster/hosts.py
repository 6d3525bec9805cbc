"""Pretend hosts on this machine: each has a network, processes, a name and an sshd of its own.

They are namespaces of the kernel that live as long as a process in them, and that process dies with this one:
nothing of a host is left when the tests end, however they end.  File systems are shared, as on a cluster.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

NETWORK = "10.99.0"
ROOT = Path(__file__).parents[2]

SSH_CONFIG = """\
Host *
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  ConnectTimeout 5
"""
SSHD_CONFIG = """\
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/ssh/authorized_keys
PermitRootLogin prohibit-password
UsePAM no
StrictModes no
PidFile none
"""

# The first process of a host: its own mounts, its sshd, then wait for ever, and bury the dead.
INIT = """\
set -e
folder=$1 name=$2 home=$3
hostname "$name"
ip link set lo up
mount --make-rprivate /
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/sshd /run/munge
mount --bind "$folder/hosts" /etc/hosts
mkdir -p "$home/.ssh"
mount --bind "$folder/ssh" "$home/.ssh"
[ ! -d "$folder/slurm" ] || mount --bind "$folder/slurm" /etc/slurm
/usr/sbin/sshd -D -f "$folder/sshd_config" 2> "$folder/$name.sshd.log" &
touch "$folder/$name.up"
while :; do sleep 3600 & wait; done
"""


class Hosts:
    """Hosts on one network; stop() ends them and all that runs on them.

    Args:
        folder: for keys, logs and configuration; a `slurm` in it becomes the hosts' /etc/slurm.
        names: of the hosts.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.names = folder, list(names)
        self._running: list[subprocess.Popen[bytes]] = []
        self._inits: dict[str, int] = {}
        self._write_files()
        try:
            switch = self._spawn(["unshare", "--net", "sleep", "infinity"])
            self._switch = switch.pid
            _wait(lambda: _network(switch.pid) != _network(os.getpid()), "the switch")
            _do(*_inside(self._switch), "ip", "link", "add", "br0", "type", "bridge", "forward_delay", "0")
            _do(*_inside(self._switch), "ip", "link", "set", "br0", "up")
            for number, name in enumerate(self.names, 1):
                self._start(name, f"{NETWORK}.{number}/24")
        except BaseException:
            self.stop()
            raise

    def command(self, host: str, words: Sequence[object], folder: Path = ROOT) -> list[str]:
        """The command that executes another on a host, in a folder."""
        own = ["-n", "-u", "-i", "-m", "-p", f"--wd={folder}"]
        return ["nsenter", "-t", str(self._inits[host]), *own, "--", *map(str, words)]

    def run(self, host: str, *words: object, seconds: float = 300, **given: Any) -> str:
        """Execute on a host (see `attempt`); what it says.

        Raises:
            AssertionError: it failed.
        """
        done = self.attempt(host, *words, seconds=seconds, **given)
        assert done.returncode == 0, f"{words} ended with {done.returncode}:\n{done.stdout}"
        return done.stdout

    def attempt(
        self, host: str, *words: object, seconds: float = 300, folder: Path = ROOT, **variables: object
    ) -> subprocess.CompletedProcess[str]:
        """Execute on a host with these variables besides the usual, whatever comes of it."""
        return subprocess.run(
            self.command(host, words, folder),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            env=environment(**variables),
        )

    def start(
        self, host: str, *words: object, log: Path, folder: Path = ROOT, **variables: object
    ) -> subprocess.Popen[bytes]:
        """Execute on a host in the background, until stop() at the latest."""
        with open(log, "ab") as file:
            command = self.command(host, words, folder)
            return self._spawn(command, stdout=file, stderr=file, env=environment(**variables))

    def unplug(self, host: str) -> None:
        """Pull the host's network cable."""
        _do(*_inside(self._switch), "ip", "link", "set", f"to-{host}", "down")

    def plug(self, host: str) -> None:
        """Put the cable back."""
        _do(*_inside(self._switch), "ip", "link", "set", f"to-{host}", "up")

    def find(self, host: str, words: str) -> list[str]:
        """The numbers, on the host, of its processes whose command lines hold these words."""
        listed = self.run(host, "ps", "-eo", "pid=,args=").splitlines()
        return [line.split()[0] for line in listed if words in line]

    def kill(self, host: str, words: str, number: int = signal.SIGKILL) -> None:
        """Signal the first process on a host whose command line holds these words."""
        found = self.find(host, words)
        assert found, self.run(host, "ps", "-eo", "pid,args")
        self.run(host, "kill", f"-{int(number)}", found[0])

    def clear(self, words: str, *hosts: str) -> None:
        """End on these hosts, by default on all, every process whose command line holds these words."""
        for host in hosts or self.names:
            if found := self.find(host, words):
                self.attempt(host, "kill", "-9", *found)

    def stop(self) -> None:
        """End every host."""
        for process in reversed(self._running):
            process.kill()
            process.wait()
        for init in self._inits.values():
            _wait(lambda init=init: not Path(f"/proc/{init}").exists(), "a host's end")
        self._running, self._inits = [], {}

    def _write_files(self) -> None:
        ssh = self.folder / "ssh"
        ssh.mkdir(mode=0o700, parents=True)
        for key in (ssh / "id_ed25519", self.folder / "host_key"):
            _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
        (ssh / "authorized_keys").write_bytes((ssh / "id_ed25519.pub").read_bytes())
        (ssh / "config").write_text(SSH_CONFIG)
        (self.folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=self.folder))
        lines = [f"{NETWORK}.{number} {name}" for number, name in enumerate(self.names, 1)]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        (self.folder / "init.sh").write_text(INIT)

    def _start(self, name: str, address: str) -> None:
        own = ["--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        script = [self.folder / "init.sh", self.folder, name, Path.home()]
        with open(self.folder / f"{name}.init.log", "wb") as log:
            outer = self._spawn(["unshare", *own, "bash", *map(str, script)], stdout=log, stderr=log)
        _wait((self.folder / f"{name}.up").exists, f"{name}; see {log.name}")
        init = int(Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text())
        self._inits[name] = init
        switch = _inside(self._switch)
        _do(*switch, "ip", "link", "add", f"to-{name}", "type", "veth", "peer", "eth0", "netns", init)
        _do(*switch, "ip", "link", "set", f"to-{name}", "master", "br0", "up")
        _do(*_inside(init), "ip", "addr", "add", address, "dev", "eth0")
        _do(*_inside(init), "ip", "link", "set", "eth0", "up")

    def _spawn(self, command: Sequence[str], **given: Any) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command, preexec_fn=_die_with_parent, stdin=subprocess.DEVNULL, **given)
        self._running.append(process)
        return process


def environment(**variables: object) -> dict[str, str]:
    """Variables of a user of this project on a host: this Python comes first, and the package is found."""
    beside = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
    own = {"PATH": beside, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return {**os.environ, **own, **{name: str(value) for name, value in variables.items()}}


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _inside(process: int) -> list[str]:
    return ["nsenter", "-t", str(process), "-n"]


def _network(process: int) -> str:
    return os.readlink(f"/proc/{process}/ns/net")


def _do(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True)


def _wait(done: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.05)
