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
import statistics
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_tokenformer.errors import UserError, run_cli
from megatron_tokenformer.metrics_file import FINISHED, METRICS, read_rows
from megatron_tokenformer.several import call_python, for_all

CONFIG = Path(__file__).with_name("run.yaml")
GROW = Path(__file__).parents[2] / "tools" / "grow_checkpoint.py"
TOKENS = "qkv=128,output=128,ffn=512"
KEEP = ("--tau", "keep")
ANNEAL = ("--tau", "anneal")  # over half of the steps
SQRT = ("--tau", "sqrt")
RANDOM_KEYS = ("--keys", "normal")
RESET = ("--optimizer", "reset")


def old_tokens(scale: float) -> tuple[str, ...]:
    """The training override that slows or freezes them."""
    return (f"optimizer.old_token_lr_scale={scale}",)


# By name: options of tools/grow_checkpoint.py, overrides of the training after it.
VARIANTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "tau kept": (KEEP, ()),
    "tau annealed": (ANNEAL, ()),
    "tau sqrt": (SQRT, ()),
    "random keys": ((*KEEP, *RANDOM_KEYS), ()),
    "random keys, tau annealed": ((*ANNEAL, *RANDOM_KEYS), ()),
    "random keys, tau sqrt": ((*SQRT, *RANDOM_KEYS), ()),
    "optimizer reset": ((*KEEP, *RESET), ()),
    "optimizer reset, tau annealed": ((*ANNEAL, *RESET), ()),
    "old tokens frozen": (KEEP, old_tokens(0.0)),
    "old tokens at 0.3": (KEEP, old_tokens(0.3)),
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
    parser.add_argument(
        "--base-steps", type=int, default=300, help="of the small model (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=200, help="of the grown model (default: %(default)s)")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS),
        metavar="NAME",
        help="(default: all)",
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, on a core each (default: 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all losses there")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="section.key=value", help="changes to run.yaml, of all runs"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Train what is not trained yet, and print the table."""
    given = parse(argv)
    pairs = list(itertools.product(given.lr, given.seeds))
    grown = [(lr, seed, name) for (lr, seed), name in itertools.product(pairs, given.variants)]
    with tqdm(total=len(pairs) + len(grown), unit="run") as bar:

        def tell(done: int, before: int = 0) -> None:
            bar.update(before + done - bar.n)

        for_all(
            given.jobs,
            lambda pair: train(base(given, *pair), *pair, given.base_steps, *given.set),
            pairs,
            tell,
        )
        for_all(
            given.jobs,
            lambda key: grow_and_train(given, *key),
            grown,
            lambda done: tell(done, before=len(pairs)),
        )
    losses = {
        name: {
            f"{lr:g}": [losses_of(variant(given, lr, seed, name)) for seed in given.seeds] for lr in given.lr
        }
        for name in given.variants
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
        tool = (GROW, "--load", source, "--tokens", TOKENS, "--save", folder / "init", *options)
        call(folder, *tool, f"run_dir={folder}", f"training.seed={seed}", f"training.steps={given.steps}")
    tokens = (f"model.tokens.{part}" for part in TOKENS.split(","))
    train(
        folder, lr, seed, given.steps, f"checkpoint.load={folder / 'init'}", *overrides, *tokens, *given.set
    )


def train(folder: Path, lr: float, seed: int, steps: int, *overrides: str) -> None:
    """One training run, unless it is finished.

    Raises:
        UserError: it failed, or was finished with other --steps.
    """
    record = folder / FINISHED
    if record.exists():
        done = json.loads(record.read_text(encoding="utf-8"))["step"]
        if done != steps:
            raise UserError(f"{folder} has done {done} steps, not {steps}; give another --run-dir")
        return
    module = ("-m", "megatron_tokenformer.training.pretrain", "--config", CONFIG)
    own = (f"run_dir={folder}", f"optimizer.lr={lr:g}", f"training.seed={seed}", f"training.steps={steps}")
    call(folder, *module, *own, *overrides)


def call(folder: Path, *arguments: object) -> None:
    """Run Python on one core, without a GPU."""
    call_python(folder, *arguments, environment={"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"})


def losses_of(folder: Path) -> dict[str, float]:
    """Validation losses of a variant, right after the growth and at the end."""
    rows = [row for row in read_rows(folder / METRICS) if "val_loss" in row]
    return {"start": rows[0]["val_loss"], "end": rows[-1]["val_loss"]}


def table(losses: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """For each variant and learning rate the mean loss over seeds, and its difference to the first's."""
    first = next(iter(losses.values()))
    rates = list(first)
    head = ["variant", *(f"loss after growth, lr {lr} | at the end" for lr in rates)]
    lines = [
        "| " + " | ".join([*head, f"end against {next(iter(losses))}"]) + " |",
        "|---" * (2 + 2 * len(rates)) + "|",
    ]
    for name, by_rate in losses.items():
        cells = [f"{mean(by_rate[lr], 'start'):.3f} | {mean(by_rate[lr], 'end'):.4f}" for lr in rates]
        lines.append(f"| {name} | {' | '.join(cells)} | {difference(by_rate, first)} |")
    return "\n".join(lines)


def mean(runs: list[dict[str, float]], key: str) -> float:
    """Over seeds."""
    return statistics.mean(run[key] for run in runs)


def difference(here: dict[str, Any], first: dict[str, Any]) -> str:
    """Mean of the differences at the end, each between two runs of one seed and learning rate.

    Its standard error is over seeds: runs of one seed are alike, and count once.
    """
    pairs = [[run["end"] - other["end"] for run, other in zip(here[lr], first[lr])] for lr in here]
    seeds = [statistics.mean(of_seed) for of_seed in zip(*pairs)]
    if here is first or len(seeds) < 2:
        return "-"
    return f"{statistics.mean(seeds):+.4f} ± {statistics.stdev(seeds) / math.sqrt(len(seeds)):.4f}"


if __name__ == "__main__":
    run_cli(main)
