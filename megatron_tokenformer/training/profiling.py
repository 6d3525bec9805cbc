"""A trace of a few steps by torch's profiler: what `--profile STEPS` writes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from torch.profiler import ProfilerAction, ProfilerActivity, profile, schedule

from megatron_tokenformer.parallel.layout import Layout

WARM_UP_STEPS = 3
"""first steps of a call allocate, compile and connect; they are left out"""
TABLE_ROWS = 40


@contextlib.contextmanager
def profiled(
    steps: int, folder: Path, layout: Layout, say: Callable[[str], None]
) -> Iterator[Callable[[], bool]]:
    """Profile `steps` steps after the first few; what is yielded is to be called after each step.

    It says whether that step was slowed by the profiler, on the ranks that are traced.

    Each rank of the first data-parallel replica (the others do the same) writes into `folder` a trace that
    chrome://tracing and ui.perfetto.dev open, and a table of its dearest operations.

    Args:
        steps: 0 profiles nothing, and costs nothing.
    """
    if steps == 0 or layout.data_rank > 0:
        yield lambda: False
        return
    on_gpu = layout.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    folder.mkdir(parents=True, exist_ok=True)

    def write(profiler: profile) -> None:
        name = f"rank-{layout.rank:05d}"
        profiler.export_chrome_trace(str(folder / f"{name}.trace.json.gz"))
        dearest = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=dearest, row_limit=TABLE_ROWS)
        (folder / f"{name}.txt").write_text(table + "\n", encoding="utf-8")
        say(f"profile of {steps} steps: {folder / name}.trace.json.gz (ui.perfetto.dev), {name}.txt")

    course = schedule(wait=WARM_UP_STEPS - 1, warmup=1, active=steps, repeat=1)
    with profile(
        activities=activities, schedule=course, on_trace_ready=write, record_shapes=True
    ) as profiler:

        def after_step() -> bool:
            slowed = profiler.current_action != ProfilerAction.NONE
            profiler.step()
            return slowed

        yield after_step
    if profiler.step_num < WARM_UP_STEPS + steps:
        say(
            f"warning: --profile {steps} needs {WARM_UP_STEPS + steps} steps, and this call did "
            f"{profiler.step_num}; the trace is cut short or missing"
        )
