"""Options that several commands have."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from megatron_tokenformer.durable import unwritable
from megatron_tokenformer.errors import UserError

LOAD = "a checkpoint, a folder of them, or a run's folder (then the newest)"


def add_model_arguments(parser: ArgumentParser) -> None:
    """How the weights of a checkpoint are read: `--precision` and `--verify`."""
    add = parser.add_argument
    add(
        "--precision",
        choices=["auto", "bf16", "fp16", "fp32"],
        default="auto",
        help="of weights and activations; auto: bf16 on a GPU, fp32 without one (default)",
    )
    add("--verify", action="store_true", help="first read the whole checkpoint and compare its hashes")


def check_output(path: Path) -> None:
    """Refuse an --output that cannot be written, or that is there, before the work of hours that it is for.

    Raises:
        UserError: says why.
    """
    if path.is_dir():
        raise UserError(f"--output {path} is a folder; name a file in it")
    if path.exists():
        raise UserError(f"{path} already exists; remove it, or name another --output")
    if not path.parent.is_dir():
        raise UserError(f"--output {path}: there is no folder {path.parent}")
    why = unwritable(path.parent)
    if why is not None:
        raise UserError(f"--output {path}: {why}", exit_code=1)
