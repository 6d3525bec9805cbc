"""Writing a run's checkpoints from all ranks together while training goes on.

Training stops for the copy of its state to host memory.  Then a thread of each rank writes.  What the
threads must tell each other goes through `Layout.checkpoint_group`, a process group that only they use, so
their collectives never mix with training's.  A save has the same outcome on every rank, and training looks
at it when it comes to the next save, which is at the same step on every rank.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tokenformer.checkpoint import store
from megatron_tokenformer.checkpoint.engine_state import Fragment
from megatron_tokenformer.checkpoint.manifest import Interval, Manifest, Shard
from megatron_tokenformer.checkpoint.shards import (
    BLOCK_ELEMENTS,
    drop_from_cache,
    verify_shard,
    write_shard,
)
from megatron_tokenformer.config.schema import Checkpoint
from megatron_tokenformer.durable import naming
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.parallel.layout import Layout, on_all_ranks

Result = TypeVar("Result")


class Saver:
    """Saves one checkpoint at a time; leaving it as a context waits for the one in flight.

    Args:
        folder: of the run's checkpoints.
        say: prints a line on the main rank, from any thread.
    """

    def __init__(
        self, folder: Path, settings: Checkpoint, layout: Layout, say: Callable[[str], None]
    ) -> None:
        self.folder, self.settings, self.layout, self._say = folder, settings, layout, say
        self._memory: list[Tensor] = []
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._failures = 0

    def start(self, manifest: Manifest, fragments: Iterable[Fragment], last: bool = False) -> None:
        """Save this moment; return when training may change its state.

        That is when it has been copied; or, for the last save, a synchronous one or one after a failure, when
        it is written.

        Args:
            manifest: complete but for the shards.
            fragments: what this rank holds; in every save of a run the same intervals.

        Raises:
            UserError: too many saves have failed in a row, or this is the last save and it failed.
        """
        began = time.perf_counter()
        self.wait()
        waits = last or not self.settings.asynchronous or self._failures > 0
        owned = [fragment for fragment in fragments if fragment.owned]
        intervals = [fragment.interval for fragment in owned]
        values = [fragment.states[state].detach() for fragment in owned for state in manifest.states]
        data: Iterable[Tensor] = values if waits else self._copy(values)
        copied = time.perf_counter() - began
        allowed = 1 if last else self.settings.max_failures

        def save() -> None:
            try:
                path = write_together(self.folder, manifest, intervals, data, self.layout)
                if self.layout.is_main:
                    store.retain(self.folder, self.settings.keep_last, self.settings.keep_every, path)
                took = time.perf_counter() - began
                stopped = took if waits else copied
                self._say(f"saved {path} in {took:.3f} s, training stopped for {stopped:.3f} s")
                self._failures = 0
            except UserError as error:
                self._failures += 1
                if self._failures >= allowed:
                    self._error = error
                else:
                    counted = f"failure {self._failures} of at most {allowed} in a row"
                    self._say(f"warning: {error}; training goes on ({counted})")
            except Exception as error:
                self._error = error

        self._thread = threading.Thread(target=save, name="checkpoint", daemon=True)
        self._thread.start()
        if waits:
            self.wait()

    def wait(self) -> None:
        """Wait for the save in flight, if there is one.

        Raises:
            UserError: it failed, as too many did before it.
        """
        self._join()
        error, self._error = self._error, None
        if isinstance(error, UserError) and self._failures > 1:
            why = f"{error}; {self._failures} saves in a row have failed"
            raise UserError(why, error.exit_code, error.everywhere)
        if error is not None:
            raise error

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
        else:
            self._join()  # how it ended is of less interest than the error that ends the run

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    @torch.no_grad()
    def _copy(self, values: list[Tensor]) -> list[Tensor]:
        """Copies in host memory that is taken once."""
        on_gpu = self.layout.device.type == "cuda"
        if not self._memory:
            total = sum(value.numel() for value in values)
            # Pinned, as a GPU copies into it at the speed of the bus.  Pinned memory is rounded up to a power
            # of two: blocks that are one waste nothing.
            self._memory = [
                torch.empty(min(BLOCK_ELEMENTS, total - first), dtype=torch.float32, pin_memory=on_gpu)
                for first in range(0, total, BLOCK_ELEMENTS)
            ]
        at = 0
        for value in values:
            while value.numel():
                place = self._memory[at // BLOCK_ELEMENTS][at % BLOCK_ELEMENTS :][: value.numel()]
                place.copy_(value[: place.numel()], non_blocking=True)
                at, value = at + place.numel(), value[place.numel() :]
        if on_gpu:
            torch.cuda.synchronize(self.layout.device)
        return self._memory


def write_together(
    folder: Path, manifest: Manifest, intervals: list[Interval], data: Iterable[Tensor], layout: Layout
) -> Path:
    """Write a checkpoint from all ranks together and return its folder.

    Args:
        manifest: complete but for the shards.
        intervals: what this rank writes; may be none.
        data: for each interval in turn the elements of its states, fp32; cut into pieces anywhere.

    Raises:
        UserError: a rank could not write, or does not read what it wrote; on every rank.  The checkpoint is
            then not there.
    """
    temporary, group = folder / store.temporary_name(manifest.step), layout.checkpoint_group

    def write_own() -> Shard | None:
        if not intervals:
            return None
        return _write_verified(temporary, layout.rank, intervals, manifest.states, data)

    def main_alone(act: Callable[[], object]) -> None:
        all_or_none(manifest.step, lambda: act() if layout.is_main else None, group)

    try:
        main_alone(lambda: store.make_empty(temporary))
        shards = [shard for shard in all_or_none(manifest.step, write_own, group) if shard]
        main_alone(lambda: store.publish(temporary, replace(manifest, shards=shards)))
    except UserError:
        if layout.is_main:
            shutil.rmtree(temporary, ignore_errors=True)  # gives a full disk its space back
        raise
    return folder / store.step_name(manifest.step)


def all_or_none(step: int, act: Callable[[], Result], group: dist.ProcessGroup | None = None) -> list[Result]:
    """Run a rank's part of a save and gather the results, over training's own group by default.

    Raises:
        UserError: a rank could not do its part; on every rank.
    """
    try:
        return on_all_ranks(act, group)
    except UserError as error:
        why = f"checkpoint of step {step} not written: {error}"
        raise UserError(why, error.exit_code, error.everywhere) from None


def _write_verified(
    folder: Path, rank: int, intervals: list[Interval], states: list[str], data: Iterable[Tensor]
) -> Shard:
    """Write a rank's shard, and read it back from the disk."""
    path = folder / f"rank-{rank:05d}.safetensors"
    with naming(path):
        shard = write_shard(path, intervals, states, data)
    drop_from_cache(path)
    verify_shard(folder, shard, states, lambda _: None)
    return shard
