"""Nothing that a launcher started outlives the stage machine's command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

GUARD = [sys.executable, "-m", "megatron_tokenformer.progressive.guard", "SIGTERM"]


def gone(process: int, within: float = 10.0) -> bool:
    """Whether a process has ended, or is a zombie that nobody collects."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def read_pid(path: Path) -> int:
    while not (path.exists() and path.read_text().endswith("\n")):
        time.sleep(0.02)
    return int(path.read_text())


def test_exit_codes_pass_through() -> None:
    here = str(os.getpid())
    assert subprocess.run([*GUARD, here, "sh", "-c", "exit 7"]).returncode == 7
    assert subprocess.run([*GUARD, here, "sh", "-c", "kill -9 $$"]).returncode == 137
    assert subprocess.run([*GUARD, "1", "sh", "-c", "exit 7"]).returncode == 1, "its machine is dead already"


@pytest.mark.parametrize("ends", ["the guard is told", "the launcher is killed"])
@pytest.mark.parametrize("rank", ["sleep 60", "exec setsid sleep 60"])
def test_a_rank_does_not_outlive_its_launcher(tmp_path: Path, ends: str, rank: str) -> None:
    # Like `deepspeed`, this launcher dies of SIGTERM and tells nobody; torchrun's ranks have own sessions.
    rank_file, launcher_file = tmp_path / "rank", tmp_path / "launcher"
    script = f"({rank}) & echo $! > {rank_file}; echo $$ > {launcher_file}; wait"
    guard = subprocess.Popen([*GUARD, str(os.getpid()), "bash", "-c", script])
    process, launcher = read_pid(rank_file), read_pid(launcher_file)
    time.sleep(0.2)  # for setsid
    if ends == "the guard is told":
        guard.terminate()
    else:
        os.kill(launcher, signal.SIGKILL)
    assert guard.wait(timeout=20) == (143 if ends == "the guard is told" else 137)
    assert gone(process)


def test_what_is_told_to_all_processes_at_once_is_one_request(tmp_path: Path) -> None:
    """SLURM signals every process of a job; the machine passes the same on: what runs may still save."""
    told = tmp_path / "told"
    script = (
        f"trap 'sleep 0.5; echo saved >> {told}; exit 85' TERM; echo $$ > {tmp_path / 'pid'}; sleep 60 & wait"
    )
    guard = subprocess.Popen([*GUARD, str(os.getpid()), "bash", "-c", script])
    read_pid(tmp_path / "pid")
    guard.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    guard.send_signal(signal.SIGUSR1)
    assert guard.wait(timeout=20) == 85
    assert told.read_text() == "saved\n"


def test_signals_while_it_ends_do_not_change_the_exit_code(tmp_path: Path) -> None:
    script = f"trap 'exit 85' TERM; echo $$ > {tmp_path / 'pid'}; sleep 60 & wait"
    guard = subprocess.Popen([*GUARD, str(os.getpid()), "bash", "-c", script])
    read_pid(tmp_path / "pid")
    guard.send_signal(signal.SIGTERM)
    while guard.poll() is None:
        guard.send_signal(signal.SIGUSR1)
    assert guard.returncode == 85


def test_a_launcher_is_asked_in_its_own_way(tmp_path: Path) -> None:
    """srun kills its ranks when it gets SIGTERM, and hands SIGUSR1 on to them."""
    script = f"trap 'exit 85' USR1; echo $$ > {tmp_path / 'pid'}; sleep 60 & wait"
    guard = subprocess.Popen([*GUARD[:-1], "SIGUSR1", str(os.getpid()), "bash", "-c", script])
    read_pid(tmp_path / "pid")
    guard.send_signal(signal.SIGTERM)
    assert guard.wait(timeout=20) == 85


def test_a_rank_does_not_outlive_a_machine_that_is_killed(tmp_path: Path) -> None:
    rank_file = tmp_path / "rank"
    script = f"sleep 60 & echo $! > {rank_file}; wait"
    program = "import os, subprocess, sys; subprocess.run([*sys.argv[1:5], str(os.getpid()), *sys.argv[5:]])"
    machine = subprocess.Popen([sys.executable, "-c", program, *GUARD, "sh", "-c", script])
    rank = read_pid(rank_file)
    machine.kill()
    machine.wait()
    assert gone(rank)
