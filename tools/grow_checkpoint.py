"""Grow a checkpoint: append parameter tokens, by default without changing what the model computes.

The target size is `model.tokens` of the config.  By default new keys are zero, tau is kept and the
optimizer's state is carried: the grown model's loss is that of the old one, and it trains on from there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_tokenformer.checkpoint.grow import grow
from megatron_tokenformer.checkpoint.manifest import Manifest
from megatron_tokenformer.checkpoint.store import find_checkpoint
from megatron_tokenformer.config.growth import Growth
from megatron_tokenformer.config.load import load_config, validate
from megatron_tokenformer.errors import run_cli

EPILOG = """\
example:
  python tools/grow_checkpoint.py --load runs/124m/checkpoints --config configs/tokenformer-354m.yaml \\
      --save runs/354m/init
  deepspeed --module megatron_tokenformer.training.pretrain --config configs/tokenformer-354m.yaml \\
      run_dir=runs/354m checkpoint.load=runs/354m/init

Adam's step count is carried with the moments, so bias correction does not help the new rows: warm the
learning rate up again in the next stage (optimizer.warmup_steps).
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--load", required=True, help="checkpoint to grow, or a folder of them (then the newest)")
    add("--config", required=True, help="run config of the next stage; its model.tokens are the target")
    add("--save", required=True, type=Path, help="folder for the grown checkpoint")
    add("overrides", nargs="*", metavar="section.key=value", help="changes to the config")
    add("--keys", choices=["zero", "normal"], default="zero", help="new keys; zero is exact (default)")
    add("--values", choices=["normal", "zero"], default="normal", help="new values (default: normal)")
    add(
        "--tau",
        choices=["keep", "anneal", "sqrt"],
        default="keep",
        help="keep (default, exact); anneal to sqrt(n) over --tau-steps (exact at the start); sqrt at once",
    )
    add("--tau-steps", type=int, metavar="N", help="steps that --tau anneal takes")
    add(
        "--optimizer",
        choices=["carry", "reset"],
        default="carry",
        help="keep the old rows' Adam moments (default), or start all of them at zero",
    )
    add("--allow-inexact", action="store_true", help="grow a softmax model although its function changes")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Grow, and print what was done and how to go on."""
    given = parse(argv)
    rule = validate(Growth, {key: getattr(given, key) for key in Growth.model_fields}, "growth")
    config = load_config(given.config, given.overrides)
    source = find_checkpoint(given.load)
    path, manifest = grow(source, config, given.save, rule)
    report(path, manifest)
    overrides = "".join(f" {text}" for text in given.overrides)
    print(
        f"next stage:\n  deepspeed --module megatron_tokenformer.training.pretrain "
        f"--config {given.config}{overrides} checkpoint.load={given.save}"
    )
    return 0


def report(path: Path, manifest: Manifest) -> None:
    """Print the growth that made a checkpoint: rows per class of tensor, tau, optimizer."""
    growth = manifest.history[-1]
    print(f"grew {growth['from']} (step {growth['step']}) to {path}")
    print(f"  parameters {growth['parameters_before']:,} -> {growth['parameters_after']:,}")
    print(f"  {'tokens':<8}{'old rows':>10}{'new rows':>10}{'tau':>12}")
    for role, after in growth["tokens_after"].items():
        before, tau = growth["tokens_before"][role], manifest.taus[role]
        course = f"{tau['start']:.2f}" + (f" -> {tau['end']:.2f}" if tau["steps"] else "")
        print(f"  {role:<8}{before:>10,}{after - before:>10,}{course:>12}")
    print(f"  new keys {growth['keys']}, new values {growth['values']}, optimizer {growth['optimizer']}")


if __name__ == "__main__":
    run_cli(main)
