"""Where the time of a step goes: data, forward, backward, reductions, other stages, the optimizer.

On a GPU spans are measured by events on the stream, which do not make the host wait before somebody asks for
the sums.

DeepSpeed's pipeline engine runs a step as a list of instructions, and looks up in its `_INSTRUCTION_MAP` what
carries each out.  Its own timers synchronise the device at every one, so here an engine gets a map of its own
in which they are timed; `tests/training/test_phases.py` tells when it no longer looks there.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from deepspeed.runtime.pipe import schedule

from megatron_tokenformer.training.engine import Engine

Item = TypeVar("Item")
Mark = Any
"""a point in time: seconds of the host, or an event on the device's stream"""

INSTRUCTIONS = {
    "forward": (schedule.ForwardPass,),
    "backward": (schedule.BackwardPass,),
    "reduction": (schedule.ReduceGrads, schedule.ReduceTiedGrads),
    "pipeline": (schedule.SendActivation, schedule.RecvActivation, schedule.SendGrad, schedule.RecvGrad),
    "optimizer": (schedule.OptimizerStep,),
}
"""which instructions are of which phase; a stage waits for another in `pipeline`, and the gathering of new
weights is in `optimizer`, the look at a rank's own gradients in `reduction`"""


class StepClock:
    """Mean times of a step and of its phases since the clock was made, asked or restarted.

    Args:
        step: steps done so far.
    """

    def __init__(self, step: int, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self.restart(step)

    def restart(self, step: int) -> None:
        """Forget what was measured, which was not all of training steps."""
        self._step, self._since = step, time.perf_counter()
        self._spans: dict[str, list[tuple[Mark, Mark]]] = defaultdict(list)

    def watch(self, engine: Engine) -> None:
        """Measure the phases of every step from now on."""
        instructions = dict(engine.deepspeed._INSTRUCTION_MAP)
        for phase, kinds in INSTRUCTIONS.items():
            for kind in kinds:
                instructions[kind] = self._timed(phase, instructions[kind])
        engine.deepspeed._INSTRUCTION_MAP = instructions

    def waiting(self, items: Iterator[Item]) -> Iterator[Item]:
        """The same items, with the host's waiting for each measured as `data`."""
        while True:
            begun = time.perf_counter()
            try:
                item = next(items)
            except StopIteration:
                return
            self._spans["data"].append((begun, time.perf_counter()))
            yield item

    def take(self, step: int) -> dict[str, float]:
        """Mean seconds `step_time_s`, `data_time_s`, ... of the steps since, of which `step` is the last.

        The clock then starts over.
        """
        steps, seconds = step - self._step, time.perf_counter() - self._since
        sums = {name: sum(_seconds(*span) for span in spans) for name, spans in self._spans.items()}
        self.restart(step)
        return {f"{name}_time_s": total / steps for name, total in {"step": seconds, **sums}.items()}

    def _timed(self, phase: str, carry_out: Callable[..., None]) -> Callable[..., None]:
        def timed(engine: Any, **operands: Any) -> None:
            begun = self._mark()
            carry_out(engine, **operands)
            self._spans[phase].append((begun, self._mark()))

        return timed

    def _mark(self) -> Mark:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(begun: Mark, ended: Mark) -> float:
    if isinstance(begun, float):
        return ended - begun
    ended.synchronize()
    return begun.elapsed_time(ended) / 1000.0
