"""A schedule whose commands are this file: a trainer and a grower that take milliseconds, and can be killed.

`python tiny.py machine SCHEDULE` is the stage machine with these commands.  With KILL set to a list such as
`train-b:middle`, the command of that name kills the machine outright at that point, once; with FAIL it exits
with code 3 (or FAIL_CODE), with HANG it sleeps, with BREAK it sleeps and fails when it is asked to leave,
and with LEAVE=train-b:middle:85 it leaves as if asked to.  ONLY names one stage to do; with AWAIT the machine
waits for a signal before it executes anything, and with REQUEUE it is SLURM's job 77.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

POINTS = ("begin", "middle", "end")


def main() -> None:
    kind, *arguments = sys.argv[1:]
    {"machine": machine, "train": train, "grow": grow}[kind](*map(Path, arguments))


def machine(schedule: Path) -> None:
    from megatron_tokenformer.errors import run_cli

    run_cli(lambda: run(schedule))


def run(schedule: Path) -> None:
    from megatron_tokenformer.progressive.chain import requeued
    from megatron_tokenformer.progressive.execute import Asked
    from megatron_tokenformer.progressive.journal import read_journal
    from megatron_tokenformer.progressive.launchers import Command
    from megatron_tokenformer.progressive.lock import exclusive
    from megatron_tokenformer.progressive.plan import load_plan
    from megatron_tokenformer.progressive.stages import Machine, run_stages

    def command(*words: object) -> Command:
        return Command([sys.executable, __file__, *map(str, words)], {"MACHINE": str(os.getpid())})

    plan = load_plan(schedule)
    asked = Asked()
    back = requeued("77") if "REQUEUE" in os.environ else contextlib.nullcontext()
    with asked.listening(signal.SIGUSR1), exclusive(plan.folder) as lock, back:
        if "AWAIT" in os.environ:  # a signal, before anything is executed
            (plan.folder / "reached-machine-begin").touch()
            while not asked.numbers:
                time.sleep(0.01)
        run_stages(
            Machine(
                plan,
                lambda stage, launch: command("train", stage.folder),
                lambda stage, source: command("grow", stage.folder, source),
                read_journal(plan.folder),
                lock,
                asked,
                os.environ.get("ONLY"),
            )
        )


def train(folder: Path) -> None:
    import yaml

    name = f"train-{folder.name}"
    log(folder, name)
    steps = yaml.safe_load((folder / "run.yaml").read_text())["training"]["steps"]
    reach(folder, name, "begin")
    done = folder / "steps.txt"
    while (step := len(done.read_text()) if done.exists() else 0) < steps:
        with open(done, "a") as file:
            file.write(".")
        if step == steps // 2:
            save(folder, step)
            reach(folder, name, "middle")
    checkpoint = save(folder, steps)
    record = {"step": steps, "checkpoint": str(checkpoint), "val_loss": 1.0, "tokens": 10, "flops": 1e6}
    (folder / "finished.json").write_text(json.dumps(record))
    reach(folder, name, "end")


def save(folder: Path, step: int) -> Path:
    checkpoint = folder / "checkpoints" / f"step-{step:08d}"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "manifest.json").write_text("{}")
    return checkpoint


def grow(folder: Path, source: Path) -> None:
    name = f"grow-{folder.name}"
    log(folder, f"{name} from {source.parent.parent.name}/{source.name}")
    reach(folder, name, "begin")
    checkpoint = folder / "init" / "step-00000000"
    checkpoint.mkdir(parents=True, exist_ok=True)
    reach(folder, name, "middle")
    (checkpoint / "manifest.json").write_text("{}")
    reach(folder, name, "end")


def log(folder: Path, line: str) -> None:
    with open(folder.parent / "log.txt", "a") as file:
        file.write(line + "\n")


def reach(folder: Path, name: str, point: str) -> None:
    mark = folder.parent / f"reached-{name}-{point}"
    if mark.exists():
        return
    here = f"{name}:{point}"
    asked, _, code = os.environ.get("LEAVE", "").rpartition(":")
    if asked == here:
        mark.touch()
        (folder / "interrupted.json").write_text('{"step": 3, "reason": "SIGTERM"}')
        sys.exit(int(code))
    if here in os.environ.get("KILL", "").split():
        mark.touch()
        os.kill(int(os.environ["MACHINE"]), signal.SIGKILL)
        time.sleep(30)  # the machine's death ends this process
    if here in os.environ.get("FAIL", "").split():
        mark.touch()
        sys.exit(int(os.environ.get("FAIL_CODE", "3")))
    if here in os.environ.get("BREAK", "").split():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if here in f"{os.environ.get('HANG', '')} {os.environ.get('BREAK', '')}".split():
        mark.touch()
        time.sleep(30)


if __name__ == "__main__":
    main()
