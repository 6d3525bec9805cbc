"""Whether a loaded run goes on as the one that wrote its checkpoint did: the first loss against that one's.

The loss of the step after a save is that of the saved weights on the next samples, which a resumed run will
compute first.  So it is the check of a load, and costs nothing: it is written beside the checkpoint when the
step is done.  A checkpoint whose run ended with it has none.
"""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_tokenformer.checkpoint import store
from megatron_tokenformer.checkpoint.manifest import read_json
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.durable import replace_durably
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.parallel.layout import Layout, from_main_rank

NEXT_LOSS = "next-loss.json"
NEXT_LOSS_BYTES = 64_000_000
"""more than any takes, with the prefixes of a large blend"""
# Relative.  In fp32 layouts differ by 1e-6, in bf16 by up to 2e-2; another batch or damaged weights by more.
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 5e-2}
SAME_LAYOUT = 1e-3
"""in 16 bits, where layout and micro-batch are the same too: then even rounding is"""


class Continuity:
    """Compares the first loss after a load, and writes the losses that later loads are compared with.

    Args:
        folder: of the run's checkpoints.
        precision: that the run computes in.
        loaded: the checkpoint that the run goes on from, if any.
        position: where in the data it goes on.

    Raises:
        UserError: what lies beside the checkpoint is not such a loss.
    """

    def __init__(
        self,
        config: RunConfig,
        layout: Layout,
        folder: Path,
        precision: str,
        loaded: Path | None,
        position: int,
    ) -> None:
        self._config, self._layout, self._folder, self._precision = config, layout, folder, precision
        self._loaded, self._expected = loaded, None
        self._saved: int | None = None
        self._replaced: os.stat_result | None = None
        self._unwritten: dict[int, dict[str, Any]] = {}
        if loaded is not None and config.checkpoint.check_loss:
            found = from_main_rank(lambda: _read(loaded))
            if found and found["samples"] == self._samples(position):
                self._expected = found

    def saved(self, step: int) -> None:
        """A save of this step is about to begin."""
        self._saved, self._replaced = step, None
        with suppress(OSError):  # one of this step that was passed over, and is there until the new one is
            self._replaced = (self._folder / store.step_name(step)).stat()

    def stepped(self, step: int, position: int, loss: Tensor) -> None:
        """A step is done.

        Args:
            step, position: after it.
            loss: of it, the same on every rank.

        Raises:
            UserError: it is the first after a load, and not what it was for the run that saved.
        """
        expected, self._expected = self._expected, None
        if expected is not None:
            self._compare(loss.item(), expected)
        # A loss that is not a number has nothing to be compared with.
        if self._saved == step - 1 and self._layout.is_main and math.isfinite(found := loss.item()):
            before = position - self._config.training.global_batch_size
            self._unwritten[step - 1] = {
                "loss": found,
                "precision": self._precision,
                "computed": self._computed(),
                "samples": self._samples(before),
            }
        self.write()

    def write(self) -> None:
        """Write each loss whose checkpoint is complete; one that was not written has no folder."""
        for step in list(self._unwritten):
            path = self._folder / store.step_name(step)
            if self._is_complete(path):
                # Without it a load is not checked, which is no reason to end a run; and the checkpoint may be
                # the one that is deleted in this moment.
                with suppress(OSError):
                    replace_durably(path / NEXT_LOSS, json.dumps(self._unwritten[step]) + "\n")
                del self._unwritten[step]
            elif step != self._saved:
                del self._unwritten[step]

    def _is_complete(self, path: Path) -> bool:
        """Whether the checkpoint that was saved last is there, and not another whose place it takes."""
        try:
            found = path.stat()
        except OSError:  # not yet, or in this moment between the two
            return False
        return self._replaced is None or not os.path.samestat(found, self._replaced)

    def _compare(self, loss: float, expected: dict[str, Any]) -> None:
        tolerance = max(TOLERANCES[self._precision], TOLERANCES[expected["precision"]])
        if self._precision == expected["precision"] and self._computed() == expected.get("computed"):
            tolerance = min(tolerance, SAME_LAYOUT)
        if not abs(loss - expected["loss"]) <= tolerance * abs(expected["loss"]):
            raise UserError(
                f"the first loss after loading {self._loaded} is {loss:.6f}, but on the same samples the run "
                f"that wrote it had {expected['loss']:.6f}: weights, data or code are not what they were; "
                "checkpoint.check_loss=false goes on all the same",
                exit_code=1,
                everywhere=True,
            )

    def _computed(self) -> dict[str, Any]:
        """What the rounding of a loss depends on, besides the precision."""
        parallel = self._config.parallel.model_dump(exclude={"timeout_minutes", "join_minutes"})
        micro_batch_size = self._config.training.micro_batch_size
        return {**parallel, "data": self._layout.data_size, "micro_batch_size": micro_batch_size}

    def _samples(self, position: int) -> dict[str, Any]:
        """What the loss of a step is of, besides the weights."""
        data = self._config.data.model_dump(mode="json", exclude={"validation", "tokenizer"})
        training = self._config.training
        return {
            "position": position,
            "global_batch_size": training.global_batch_size,
            "seed": training.seed,
            **data,
        }


def _read(checkpoint: Path) -> dict[str, Any] | None:
    path = checkpoint / NEXT_LOSS
    try:
        found = read_json(path, NEXT_LOSS_BYTES)
        sound = isinstance(found["loss"], float) and found["precision"] in TOLERANCES
        if not (sound and isinstance(found["samples"], dict)):
            raise ValueError
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", exit_code=1) from error
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged; remove it to load without this check", exit_code=1) from None
    return found
