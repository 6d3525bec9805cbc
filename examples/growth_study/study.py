"""What to do at a growth: tau, new keys, optimizer, old tokens, compared at equal steps on the demo's data.

For each learning rate and seed one small model is trained; then each variant grows it to four times the
tokens and trains it on for as many steps as all others, on the same batches.  It calls the public commands
alone, and skips what is finished, so a call that was stopped goes on.  Needs the data of `make demo`.

example:
  python examples/growth_study/study.py --jobs 2 --json benchmarks/results/growth-study.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_tokenformer.errors import UserError, run_cli
from megatron_tokenformer.training.metrics import FINISHED, METRICS, read_rows

HERE = Path(__file__).parent
CONFIG = HERE / "run.yaml"
TOKENS = "qkv=128,output=128,ffn=512"
STEPS = 200
ANNEAL = ("--tau", "anneal", "--tau-steps", str(STEPS // 2))
SQRT = ("--tau", "sqrt")
RANDOM_KEYS = ("--keys", "normal")
RESET = ("--optimizer", "reset")


def old_tokens(scale: float) -> tuple[str, ...]:
    """The training override that slows or freezes them."""
    return (f"optimizer.old_token_lr_scale={scale}",)


# By name: options of tools/grow_checkpoint.py, overrides of the training after it.
VARIANTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "tau annealed": (ANNEAL, ()),
    "tau sqrt": (SQRT, ()),
    "random keys": (RANDOM_KEYS, ()),
    "random keys, tau annealed": ((*RANDOM_KEYS, *ANNEAL), ()),
    "random keys, tau sqrt": ((*RANDOM_KEYS, *SQRT), ()),
    "optimizer reset": (RESET, ()),
    "optimizer reset, tau annealed": ((*RESET, *ANNEAL), ()),
    "old tokens frozen": ((), old_tokens(0.0)),
    "old tokens at 0.3": ((), old_tokens(0.3)),
    "old tokens at 0.3, tau annealed": (ANNEAL, old_tokens(0.3)),
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run-dir", type=Path, default=Path("runs/growth_study"))
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 4e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=STEPS, help="of the grown model (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, on a core each (default: 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all losses there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Train what is not trained yet, and print the table."""
    given = parse(argv)
    pairs = list(itertools.product(given.lr, given.seeds))
    grown = [(lr, seed, name) for (lr, seed), name in itertools.product(pairs, VARIANTS)]
    with ThreadPoolExecutor(given.jobs) as pool, tqdm(total=len(pairs) + len(grown), unit="run") as bar:

        def done(_: object) -> None:
            bar.update()

        for result in pool.map(lambda pair: train(given, base(given, *pair), *pair), pairs):
            done(result)
        for result in pool.map(lambda key: grow_and_train(given, *key), grown):
            done(result)
    losses = {
        name: {
            f"{lr:g}": [losses_of(variant(given, lr, seed, name)) for seed in given.seeds] for lr in given.lr
        }
        for name in VARIANTS
    }
    print(table(losses))
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps({"steps": given.steps, "losses": losses}, indent=1) + "\n")
    return 0


def base(given: argparse.Namespace, lr: float, seed: int) -> Path:
    """The folder of the small model's run."""
    return given.run_dir / f"lr-{lr:g}-seed-{seed}" / "base"


def variant(given: argparse.Namespace, lr: float, seed: int, name: str) -> Path:
    """The folder of a variant's run."""
    return base(given, lr, seed).with_name(name.replace(", ", "-").replace(" ", "-"))


def grow_and_train(given: argparse.Namespace, lr: float, seed: int, name: str) -> None:
    """Grow the small model in one way, and train it on."""
    options, overrides = VARIANTS[name]
    source, folder = base(given, lr, seed), variant(given, lr, seed, name)
    if not (folder / FINISHED).exists():
        tool = ("tools/grow_checkpoint.py", "--load", source, "--tokens", TOKENS, "--save", folder / "init")
        call(folder, *tool, *options, f"run_dir={folder}", f"training.seed={seed}")
    rest = ("checkpoint.load=" + str(folder / "init"), f"training.steps={given.steps}", *overrides)
    tokens = (f"model.tokens.{part}" for part in TOKENS.split(","))
    train(given, folder, lr, seed, *rest, *tokens)


def train(given: argparse.Namespace, folder: Path, lr: float, seed: int, *overrides: str) -> None:
    """One training run, unless it is finished."""
    if (folder / FINISHED).exists():
        return
    module = ("-m", "megatron_tokenformer.training.pretrain", "--config", CONFIG)
    own = (f"run_dir={folder}", f"optimizer.lr={lr:g}", f"training.seed={seed}")
    call(folder, *module, *own, *overrides)


def call(folder: Path, *arguments: object) -> None:
    """Run Python on one core, with its messages in the run's folder.

    Raises:
        UserError: it failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with open(folder / "output.log", "a", encoding="utf-8") as log:
        code = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False).returncode
    if code:
        raise UserError(f"{' '.join(command)} failed; its messages are in {log.name}", exit_code=1)


def losses_of(folder: Path) -> dict[str, float]:
    """Validation losses of a variant, right after the growth and at the end."""
    rows = [row for row in read_rows(folder / METRICS) if "val_loss" in row]
    return {"start": rows[0]["val_loss"], "end": rows[-1]["val_loss"]}


def table(losses: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """For each variant and learning rate the mean loss over seeds, and its difference to the default's."""
    rates = list(losses["default"])
    head = ["variant", *(f"loss after growth, lr {lr} | at the end" for lr in rates)]
    lines = [
        "| " + " | ".join([*head, "end against default"]) + " |",
        "|---" * (2 + 2 * len(rates)) + "|",
    ]
    for name, by_rate in losses.items():
        cells = [f"{mean(by_rate[lr], 'start'):.3f} | {mean(by_rate[lr], 'end'):.4f}" for lr in rates]
        lines.append(f"| {name} | {' | '.join(cells)} | {difference(by_rate, losses['default'])} |")
    return "\n".join(lines)


def mean(runs: list[dict[str, float]], key: str) -> float:
    """Over seeds."""
    return statistics.mean(run[key] for run in runs)


def difference(here: dict[str, Any], default: dict[str, Any]) -> str:
    """Mean of the paired differences over learning rates and seeds, and its standard error."""
    pairs = [
        run["end"] - other["end"] for lr in here for run, other in zip(here[lr], default[lr], strict=True)
    ]
    if here is default or len(pairs) < 2:
        return "-"
    return f"{statistics.mean(pairs):+.4f} ± {statistics.stdev(pairs) / math.sqrt(len(pairs)):.4f}"


if __name__ == "__main__":
    run_cli(main)
