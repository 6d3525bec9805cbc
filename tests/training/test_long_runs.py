"""What a process holds does not grow with its steps: a run takes hundreds of thousands."""

from __future__ import annotations

import gc
import os
from pathlib import Path

from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.parallel.layout import Layout
from megatron_tokenformer.training.loop import train_steps
from megatron_tokenformer.training.run import open_run
from tests.ranks import run_ranks
from tests.toy import toy_config

STEPS = 30


def held(layout: Layout, config: RunConfig) -> tuple[list[int], list[int], int]:
    """Open files and Python's objects after every step, and spans that DeepSpeed's timers keep at the end."""
    files, objects = [], []

    def look() -> bool:
        gc.collect()
        files.append(len(os.listdir("/proc/self/fd")))
        objects.append(len(gc.get_objects()))
        return False

    with open_run(config, layout, None) as run:
        train_steps(run, look)
        timers = run.engine.deepspeed.timers.get_timers().values()
        return files, objects, sum(len(timer.event_timers) for timer in timers)


def test_nothing_grows_with_the_steps(tmp_path: Path) -> None:
    often = {"steps": STEPS, "eval_interval": 5, "eval_steps": 1, "micro_batch_size": 4}
    config = toy_config(tmp_path, training=often, checkpoint={"interval": 5}, parallel={"pipeline": 2})
    for files, objects, spans in run_ranks(2, held, config, pipeline=2):
        # The least of a third, as a checkpoint that is being written, or a log line, has its own for a while.
        middle, last = slice(STEPS // 3, 2 * STEPS // 3), slice(2 * STEPS // 3, STEPS)
        assert min(files[last]) <= min(files[middle])
        assert min(objects[last]) - min(objects[middle]) < STEPS // 3, "less than one a step"
        assert spans == 0
