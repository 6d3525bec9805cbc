"""The process that holds Weights & Biases for a run: it reads commands, a JSON object a line, from its input.

W&B may hang, die, or wait for a network for hours, at any call and again when the process ends.  Here that
stops nobody: the run writes lines into a pipe and goes on (`wandb_sink.py`).  An input that ends without
`finish` is a run that died.  What it answers, likewise a line each, is `ready` (where W&B's files are, with
its `services`), `told` (for the user), `done` (how many commands so far), and `failed`, its last.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from typing import Any, TextIO


def main() -> int:
    """Open the run that the first line describes, carry out the others, finish."""
    # What asks the training to leave is sent to all processes of a job; this one leaves when its input ends.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    os.environ.setdefault("WANDB_SILENT", "true")
    # W&B prints; nothing but answers may go where the run reads them.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    try:
        run = open_run(json.loads(sys.stdin.readline()), answers)
        return follow(run, answers)
    except Exception as error:
        answer(answers, failed=" ".join(str(error).split()) or type(error).__name__)
        return 1


def open_run(wanted: dict[str, Any], answers: TextIO) -> Any:
    """The W&B run, online as wanted or offline where that does not work."""
    import wandb

    known = wandb.Settings.model_fields
    settings = {
        "init_timeout": wanted.pop("start_s"),
        "console": "off",
        "x_stats_pid": wanted.pop("pid"),
        "finish_timeout": wanted.pop("finish_s"),
    }
    wanted["settings"] = wandb.Settings(**{key: value for key, value in settings.items() if key in known})
    try:
        run = wandb.init(**wanted)
    except Exception as error:
        if wanted["mode"] != "online":
            raise
        why = " ".join(str(error).split())
        with contextlib.suppress(Exception):
            wandb.teardown()  # its service holds the run's id
        run = wandb.init(**{**wanted, "mode": "offline"})
        answer(
            answers,
            told=f"warning: logging.wandb.mode=online: {why}  This run is written offline; "
            f"`wandb sync {run.settings.sync_dir}` sends it, after `wandb login`",
        )
    # Charts are drawn against the run's own step, which goes back when the run does; W&B's may not.
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    answer(answers, ready=run.settings.sync_dir, services=own_children())
    return run


def own_children() -> list[int]:
    """W&B's service, which has a session of its own and would outlive this process if it hangs."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(pid) for pid in file.read().split()]
    except OSError:  # not Linux
        return []


def follow(run: Any, answers: TextIO) -> int:
    """Carry out the commands: rows at W&B's own step `at`, entries of the summary, the end."""
    for done, line in enumerate(sys.stdin, start=1):
        command = json.loads(line)
        if "finish" in command:
            run.finish(exit_code=command["finish"])
            return 0
        if "summary" in command:
            run.summary.update(command["summary"])
        if "row" in command:
            run.log(command["row"], step=command["at"])
        answer(answers, done=done)
    run.finish(exit_code=1)
    return 1


def answer(answers: TextIO, **said: Any) -> None:
    """Tell the run, which may be gone."""
    with contextlib.suppress(BrokenPipeError):
        answers.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    # Nothing that W&B would still do at the end, such as to wait for a service that is dead.
    os._exit(main())
