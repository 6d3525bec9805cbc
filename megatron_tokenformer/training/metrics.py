"""What a run says: a line on the terminal, a row in metrics.jsonl, and Weights & Biases or TensorBoard."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from tqdm import tqdm

from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.durable import replace_durably
from megatron_tokenformer.errors import UserError

METRICS = "metrics.jsonl"
FINISHED = "finished.json"
"""the record of a run that has all its steps; launchers' exit codes do not prove it"""
INTERRUPTED = "interrupted.json"
"""the record of a run that was asked to leave, and saved; it stays until the run is started again"""


PHASES = ("data", "forward", "backward", "reduction", "pipeline", "optimizer")
"""of a step, as `phases.py` measures them; a row has `data_time_s` and so on"""


class Sink(Protocol):
    """Somewhere that numbers go, by name and step."""

    def log(self, row: dict[str, Any], step: int) -> None: ...

    def close(self) -> None: ...


class MetricsLog:
    """The run's numbers, on the main rank; on the others it does nothing.

    Args:
        config: of the run; `run_dir` and `logging` are read.
        step: the last step whose rows stay; those after it are of steps that are done again.
    """

    def __init__(self, config: RunConfig, step: int, is_main: bool) -> None:
        self.is_main, self.steps = is_main, config.training.steps
        self._sinks: list[Sink] = []
        if not is_main:
            return
        folder = Path(config.run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / METRICS
        drop_rows_after(self._path, step)
        self._file = open(self._path, "a", encoding="utf-8")
        self._bar = tqdm(total=self.steps, initial=max(step, 0), unit="step", disable=None, leave=False)
        if config.logging.wandb.mode != "disabled":
            self._sinks.append(_WandbSink(config))
        if config.logging.tensorboard:
            self._sinks.append(_TensorboardSink(folder / "tensorboard", step))

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_main:
            self._bar.close()
            self._file.close()
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
        """Something besides the numbers of a step: `row` has a `step` and the name of the `event`.

        It goes into the file alone: the other sinks draw numbers.
        """
        self.say(f"warning: {told}")
        if self.is_main:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()

    def rewind(self, step: int) -> None:
        """The run has gone back to this step: drop the rows after it."""
        if self.is_main:
            self._file.close()
            drop_rows_after(self._path, step)
            self._file = open(self._path, "a", encoding="utf-8")
            self._bar.n = step
            self._bar.refresh()

    def _write(self, row: dict[str, Any]) -> None:
        if self.is_main:
            # JSON has no infinity: what is not finite, such as the norm of a skipped step, is null.
            row = {key: value if math.isfinite(value) else None for key, value in row.items()}
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            for sink in self._sinks:
                sink.log(row, row["step"])


def shares(row: Mapping[str, Any]) -> str:
    """Each phase's share of the step in a row, such as `data 0, forward 31, backward 52 %`."""
    phases = [name for name in PHASES if f"{name}_time_s" in row]
    parts = [f"{name} {100 * row[f'{name}_time_s'] / row['step_time_s']:.0f}" for name in phases]
    return ", ".join(parts) + " %"


def drop_rows_after(path: Path, step: int) -> None:
    """Drop the rows of a metrics file that belong to later steps, and a last row that is cut short."""
    if not path.exists():
        return
    kept = [row for row in read_rows(path) if row["step"] <= step]
    replace_durably(path, "".join(json.dumps(row) + "\n" for row in kept))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last one that is cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class _WandbSink:
    def __init__(self, config: RunConfig) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb  # costs a second, and is an option

        try:
            self._run = wandb.init(
                project=config.logging.wandb.project,
                name=Path(config.run_dir).name,
                dir=config.run_dir,
                mode=config.logging.wandb.mode,
                config=config.model_dump(mode="json"),
            )
        except (wandb.errors.UsageError, wandb.errors.CommError) as error:
            why = " ".join(str(error).split())
            raise UserError(f"logging.wandb.mode=online: {why}; mode=offline needs no account") from None

    def log(self, row: dict[str, Any], step: int) -> None:
        self._run.log(row, step=step)

    def close(self) -> None:
        self._run.finish()


class _TensorboardSink:
    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("logging.tensorboard=true needs the package tensorboard; install it") from None
        self._writer = SummaryWriter(str(folder), purge_step=max(step, 0) + 1)

    def log(self, row: dict[str, Any], step: int) -> None:
        for name, value in row.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()
