"""Where the time of a step goes: waiting for data, forward, AdamW, and the rest.

The rest is the backward pass, the reductions, and waiting for other stages, which DeepSpeed runs without a
place to look between them; `--profile` shows them one by one.  On a GPU spans are measured by events on the
stream, which do not make the host wait before somebody asks for the sums.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, TypeVar

import torch

from megatron_tokenformer.training.engine import Engine

Item = TypeVar("Item")
Mark = Any
"""a point in time: seconds of the host, or an event on the device's stream"""


class StepClock:
    """Mean times of a step and of its phases since the clock was made, asked or restarted.

    Args:
        step: steps done so far.
    """

    def __init__(self, step: int, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._begun: dict[str, Mark] = {}
        self.restart(step)

    def restart(self, step: int) -> None:
        """Forget what was measured, which was not all of training steps."""
        self._step, self._since = step, time.perf_counter()
        self._spans: dict[str, list[tuple[Mark, Mark]]] = defaultdict(list)

    def watch(self, engine: Engine) -> None:
        """Measure `forward` and `optimizer` of every step from now on."""
        module, optimizer = engine.deepspeed.module, engine.optimizer
        module.register_forward_pre_hook(lambda *_: self._begin("forward"))
        module.register_forward_hook(lambda *_: self._end("forward"))
        optimizer.register_step_pre_hook(lambda *_: self._begin("optimizer"))
        optimizer.register_step_post_hook(lambda *_: self._end("optimizer"))

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

    def _begin(self, name: str) -> None:
        self._begun[name] = self._mark()

    def _end(self, name: str) -> None:
        self._spans[name].append((self._begun.pop(name), self._mark()))

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
