"""What a run says: a line on the terminal, a row in metrics.jsonl, and Weights & Biases or TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.metrics_file import METRICS, MetricsFile, finite
from megatron_tokenformer.training.sinks import Guarded, TensorboardSink
from megatron_tokenformer.training.wandb_sink import WandbSink, WandbState

PHASES = ("data", "forward", "backward", "reduction", "pipeline", "optimizer")
"""of a step, as `phases.py` measures them; a row has `data_time_s` and so on"""


class MetricsLog:
    """The run's numbers, on the main rank; on the others it does nothing.

    Args:
        config: of the run; `run_dir` and `logging` are read.
        step: the last step whose rows stay; those after it are of steps that are done again.
    """

    def __init__(self, config: RunConfig, step: int, is_main: bool) -> None:
        self.is_main, self.steps = is_main, config.training.steps
        self._sinks: list[Guarded] = []
        if not is_main:
            return
        folder = Path(config.run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._file, self._troubled = MetricsFile(folder / METRICS, step), False
        self._bar = tqdm(total=self.steps, initial=max(step, 0), unit="step", disable=None, leave=False)
        self._sinks = _open_sinks(config, step, self._file.last_step, self.say)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_main:
            self._bar.close()
            self._close_file()
            for sink in self._sinks:
                sink.close()

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self.is_main:
            self._bar.write(text)

    def advance(self) -> None:
        """One step is done."""
        if self.is_main:
            self._bar.update()

    def training(self, row: dict[str, Any]) -> None:
        """A logged training step."""
        rate = f"{row['tokens_per_s']:,.0f} tokens/s, {row['tflops_per_device']:.3g} TFLOP/s a device"
        mfu = f", MFU {row['mfu']:.1%}" if "mfu" in row else ""
        memory = f", {row['peak_memory_bytes'] / 1e9:.1f} GB at most"
        skipped = f"  {row['skipped_steps']} steps skipped" if row["skipped_steps"] else ""
        traced = "  (slowed by the profiler)" if row["profiled"] else ""
        self.say(
            f"step {row['step']:>{len(str(self.steps))}}/{self.steps}  loss {row['loss']:.4f}  "
            f"lr {row['lr']:.2e}  grad norm {row['grad_norm']:.3f}  "
            f"{row['step_time_s'] * 1000:,.0f} ms ({shares(row)})  {rate}{mfu}{memory}{skipped}{traced}"
        )
        self._write(row)

    def evaluation(self, row: dict[str, Any]) -> None:
        """A validation loss."""
        self.say(
            f"step {row['step']:>{len(str(self.steps))}}/{self.steps}  "
            f"validation loss {row['val_loss']:.6f}  perplexity {row['val_ppl']:.3f}"
        )
        self._write(row)

    def scores(self, row: dict[str, Any]) -> None:
        """Figures of tasks, by `task/metric`."""
        told = "  ".join(f"{name} {value:.4f}" for name, value in row.items() if "/" in name)
        self.say(f"step {row['step']:>{len(str(self.steps))}}/{self.steps}  {told}")
        self._write(row)

    def event(self, row: dict[str, Any], told: str) -> None:
        """Something besides the numbers of a step: `row` has a `step` and the name of the `event`."""
        self.say(told)
        if self.is_main:
            self._to_file(row)
            for sink in self._sinks:
                sink.event(row, told)

    def rewind(self, step: int) -> None:
        """The run has gone back to this step: drop the rows after it."""
        if self.is_main:
            self._file.rewind(step)
            self._bar.n = step
            self._bar.refresh()
            for sink in self._sinks:
                sink.rewind(step)

    def _write(self, row: dict[str, Any]) -> None:
        if self.is_main:
            self._to_file(row)
            for sink in self._sinks:
                sink.log({key: finite(value) for key, value in row.items()})

    def _to_file(self, row: dict[str, Any]) -> None:
        self._file.write(row)
        if self._file.problem and not self._troubled:
            self.say(
                f"warning: {self._file.path} cannot be written ({self._file.problem}); training goes on, and "
                "its rows are kept until it can"
            )
        if self._troubled and not self._file.problem:
            self.say(f"{self._file.path} is written again, with all rows")
        self._troubled = self._file.problem is not None

    def _close_file(self) -> None:
        """What could not be written is at least in the log of the job."""
        self._file.close()
        if self._file.waiting:
            rows = "\n".join(json.dumps(row) for row in self._file.waiting)
            self.say(f"warning: these rows could not be written to {self._file.path}:\n{rows}")


def _open_sinks(
    config: RunConfig, step: int, last_step: int | None, say: Callable[[str], None]
) -> list[Guarded]:
    """What the config asks for besides the file.

    Args:
        step, last_step: the last that counts, and the last that had been logged.
    """
    folder, sinks = Path(config.run_dir), []
    if config.logging.wandb.mode != "disabled":
        state = WandbState.read(folder)
        sinks.append(
            Guarded(
                "W&B", lambda first: WandbSink(config, state, (step, last_step) if first else None, say), say
            )
        )
    if config.logging.tensorboard:
        files = folder / "tensorboard"
        sinks.append(
            Guarded("TensorBoard", lambda first: TensorboardSink(files, config, step if first else None), say)
        )
    return sinks


def shares(row: Mapping[str, Any]) -> str:
    """Each phase's share of the step in a row, such as `data 0, forward 31, backward 52 %`."""
    phases = [name for name in PHASES if f"{name}_time_s" in row]
    parts = [f"{name} {100 * row[f'{name}_time_s'] / row['step_time_s']:.0f}" for name in phases]
    return ", ".join(parts) + " %"
