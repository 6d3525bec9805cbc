"""Options that several commands have."""

from __future__ import annotations

from argparse import ArgumentParser

LOAD = "a checkpoint, a folder of them, or a run's folder (then the newest)"


def add_model_arguments(parser: ArgumentParser) -> None:
    """How the weights of a checkpoint are read: ``--precision`` and ``--verify``."""
    add = parser.add_argument
    add(
        "--precision",
        choices=["auto", "bf16", "fp16", "fp32"],
        default="auto",
        help="of weights and activations; auto: bf16 on a GPU, fp32 without one (default)",
    )
    add("--verify", action="store_true", help="first read the whole checkpoint and compare its hashes")
