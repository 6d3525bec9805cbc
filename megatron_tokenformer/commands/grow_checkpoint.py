"""Grow a checkpoint: append parameter tokens, by default without changing what the model computes now.

A dense checkpoint (model.architecture: transformer) grows in width instead, by Net2Net: --config has a larger
hidden_size, by a whole factor, and as many times the attention_heads.

The target size is `model.tokens` of --config, or is given by --tokens or --target-params.  By default new
keys are zero, the optimizer's state is carried, and tau goes to sqrt(n) over half of the next stage: the
grown model's loss is that of the old one, and it trains on from there.

With --shrink it takes tokens away instead: from each Pattention those of least |K| |V|, the product of the
norms of key and value.
"""

from __future__ import annotations

import argparse
import json
import shlex
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_tokenformer.checkpoint import grow, net2net, shrink
from megatron_tokenformer.checkpoint.growth_plan import GrowthPlan, plan_growth
from megatron_tokenformer.checkpoint.manifest import Manifest
from megatron_tokenformer.checkpoint.net2net import WideningPlan, plan_widening
from megatron_tokenformer.checkpoint.resize import read_source
from megatron_tokenformer.checkpoint.resize_report import AnyPlan, describe, report
from megatron_tokenformer.checkpoint.shrink import ShrinkPlan, plan_shrink
from megatron_tokenformer.checkpoint.step_zero import check_space, check_writable
from megatron_tokenformer.checkpoint.store import find_checkpoints, first_good
from megatron_tokenformer.checkpoint.stored_model import check_stored, stored_config
from megatron_tokenformer.commands.command_line import CommandParser, as_started
from megatron_tokenformer.config.growth import Growth, Shrinking, check_has_tokens
from megatron_tokenformer.config.load import dump_config, load_config, merge, parse_override, validate
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.config.target_size import parse_count, parse_tokens, tokens_for
from megatron_tokenformer.durable import replace_durably
from megatron_tokenformer.errors import UserError, run_cli
from megatron_tokenformer.evaluation.perplexity import Evaluation, Score, evaluate, open_evaluation

EPILOG = """\
examples:
  python tools/grow_checkpoint.py --load runs/124m/checkpoints --config configs/tokenformer-354m.yaml \\
      --save runs/354m/init
  deepspeed --module megatron_tokenformer.training.pretrain --config configs/tokenformer-354m.yaml \\
      run_dir=runs/354m checkpoint.load=runs/354m/init

  # no config for the next size: the rest is then the checkpoint's own config, written to SAVE/config.yaml
  python tools/grow_checkpoint.py --load runs/124m --target-params 757M --save runs/757m/init \\
      run_dir=runs/757m

  # what it would take, without writing anything
  python tools/grow_checkpoint.py --load runs/124m --tokens qkv=2144,output=2144,ffn=8576 \\
      --save runs/354m/init --dry-run

  # a dense model, to twice the width (the loss stays; to 1152 it would change, and need --allow-inexact)
  python tools/grow_checkpoint.py --load runs/dense --config configs/transformer-124m.yaml \\
      --save runs/wider/init run_dir=runs/wider model.hidden_size=1536 model.attention_heads=24

  # back to fewer tokens, and what that costs on a million tokens
  python tools/grow_checkpoint.py --shrink --load runs/354m --target-params 200M --save runs/200m/init \\
      run_dir=runs/200m --data data/pile-validation_text_document --max-tokens 1000000

Adam's step count is carried with the moments, so bias correction does not help the new rows: warm the
learning rate up again in the next stage (optimizer.warmup_steps).  There optimizer.old_token_lr_scale slows
the old tokens, or with 0 freezes them.
"""
OF_GROWTH = (
    *("keys", "values", "tau", "tau_steps", "old_token_noise", "spread", "allow_inexact"),
    *("link", "no_verify"),
)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(__doc__, EPILOG)
    add = parser.add_argument
    add("--load", required=True, help="checkpoint to grow, or a folder of them (then the newest)")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--config", help="run config of the next stage; its model.tokens are the target")
    size.add_argument("--tokens", metavar="qkv=N,output=N,ffn=N", help="the target; a role left out stays")
    size.add_argument(
        "--target-params",
        metavar="N",
        help="about this many parameters, such as 757M: all roles in proportion, in multiples of 32 tokens",
    )
    save = "folder for the new checkpoint; replaces one that an earlier growth left there"
    add("--save", required=True, type=Path, help=save)
    add("overrides", nargs="*", metavar="section.key=value", help="changes to the config")
    add("--shrink", action="store_true", help="take the tokens of least |K| |V| away instead; keeps tau")
    add_rule_options(parser)
    add("--link", action="store_true", help="hard-link the old shards instead of copying, where possible")
    add(
        "--no-verify", action="store_true", help="with --link: do not read the old shards to check their hash"
    )
    add("--dry-run", action="store_true", help="print sizes, and write nothing")
    add(
        "--data",
        action="append",
        metavar="PREFIX",
        help="a dataset to measure the loss on, before and after, in fp32; each takes a --data of its own",
    )
    add("--max-tokens", type=int, metavar="N", help="with --data: only the first N tokens of each")
    add("--json", action="store_true", help="print all figures as one JSON object in the last line")
    given = parser.parse_intermixed_args(argv)  # overrides may stand anywhere
    refuse_contradictions(given)
    return given


def add_rule_options(parser: argparse.ArgumentParser) -> None:
    """How the new tokens start, and what becomes of the old ones."""
    add = parser.add_argument
    add("--keys", choices=["zero", "normal"], help="new keys; zero is exact (default)")
    add("--values", choices=["normal", "zero"], help="new values (default: normal)")
    add(
        "--tau",
        choices=["keep", "anneal", "sqrt"],
        help="anneal to sqrt(n) over --tau-steps (default, exact at the start); keep (exact); sqrt at once",
    )
    add(
        "--tau-steps",
        type=int,
        metavar="N",
        help="steps that --tau anneal takes (default: half of training.steps)",
    )
    add(
        "--optimizer",
        choices=["carry", "reset"],
        default="carry",
        help="keep the old rows' Adam moments (default), or start all of them at zero",
    )
    add(
        "--old-token-noise",
        type=float,
        metavar="STD",
        help="add normal noise to the old keys and values (default: 0; inexact)",
    )
    add(
        "--spread",
        type=float,
        metavar="STD",
        help="of a dense model: how unequally copies are read (default: 0.5; 0: they stay equal)",
    )
    add(
        "--allow-inexact",
        action="store_true",
        help="grow although the function changes: of a softmax model, or to a width that is no multiple",
    )


def refuse_contradictions(given: argparse.Namespace) -> None:
    """Refuse options that do not go together, and name them.

    Raises:
        UserError: there are such.
    """
    if given.shrink:
        of_growth = [key for key in OF_GROWTH if getattr(given, key) not in (None, False)]
        if of_growth:
            option = f"--{of_growth[0].replace('_', '-')}"
            raise UserError(f"{option} is for growth, --shrink takes tokens away; leave one out")
    if given.values == "zero" and given.keys != "normal":
        raise UserError("--values zero with zero keys never learns; --keys normal goes with it")
    if given.tau not in ("anneal", None) and given.tau_steps is not None:
        raise UserError(f"--tau-steps {given.tau_steps} goes with --tau anneal; it says how long that takes")
    if given.data and given.dry_run:
        raise UserError("--data measures what was written, --dry-run writes nothing; leave one out")
    words = [text for text in given.overrides if "=" not in text]
    if given.data and words:
        raise UserError(
            f"'{words[0]}' is neither an option nor section.key=value; if it is a dataset, it takes a --data "
            f"of its own: --data {given.data[-1]} --data {words[0]}"
        )
    if given.max_tokens is not None and not given.data:
        raise UserError("--max-tokens goes with --data; it says how much of it is read")
    if given.no_verify and not given.link:
        raise UserError("--no-verify goes with --link; copying checks every hash on the way, at no cost")


def main(argv: list[str] | None = None) -> int:
    """Grow or shrink, and print what was done and how to go on."""
    given = parse(argv)
    source, manifest = first_good(find_checkpoints(given.load), check_stored)
    target = target_config(given, source, manifest)
    plan = make_plan(given, source, target)
    check_writable(plan.folder, plan.doing)
    figures = describe(plan)
    if given.dry_run:
        report(plan, figures)
        size = plan.needed_bytes(plan.will_link) if isinstance(plan, GrowthPlan) else plan.new_bytes
        check_space(plan.folder, plan.doing, size)
    else:
        # First, so that a mistake in the data costs nothing; in fp32, for growth changes the loss by nothing.
        opened = open_evaluation(source, given.data, max_tokens=given.max_tokens) if given.data else None
        before = evaluate(opened, "fp32") if opened else []
        figures |= carry_out(plan)
        report(plan, figures)
        if opened:
            figures["losses"] = print_losses(opened, before, Path(figures["path"]))
        elif not figures["exact"]:
            tell_how_to_measure(target, source, figures["path"])
        tell_next_stage(given, target)
    if given.json:
        print(json.dumps(figures))
    return 0


def make_plan(given: argparse.Namespace, source: Path, target: RunConfig) -> AnyPlan:
    """What is to be done, checked as far as can be before it begins."""
    if given.shrink:
        rule = validate(Shrinking, {"optimizer": given.optimizer}, "shrinking")
        return plan_shrink(source, target, given.save, rule)
    told = {key: getattr(given, key) for key in Growth.model_fields}
    growth = validate(Growth, {key: value for key, value in told.items() if value is not None}, "growth")
    if target.model.is_dense and read_source(source)[1].is_dense:
        if given.link:
            raise UserError("--link keeps the old shards as they are, widening writes all anew; leave it out")
        return plan_widening(source, target, given.save, growth.widening())
    return plan_growth(source, target, given.save, growth, given.link, verify=not given.no_verify)


def carry_out(plan: AnyPlan) -> dict[str, Any]:
    """Do it; the figures that are known only then."""
    start = time.perf_counter()
    if isinstance(plan, ShrinkPlan):
        path, manifest = shrink.carry_out(plan)
        figures = {key: manifest.history[-1][key] for key in ("reach", "exact")}
    elif isinstance(plan, WideningPlan):
        path, _ = net2net.carry_out(plan)
        figures = {}
    else:
        grown = grow.carry_out(plan)
        path = grown.path
        figures = {"old_rows": grown.old_rows, "norms": grown.manifest.history[-1]["norms"]}
    return {**figures, "path": str(path), "seconds": round(time.perf_counter() - start, 3)}


def target_config(given: argparse.Namespace, source: Path, manifest: Manifest) -> RunConfig:
    """The run config of the grown model: the one given, or the checkpoint's own with more tokens."""
    if given.config:
        return load_config(given.config, given.overrides)
    own = stored_config(source, manifest)
    before = own.model
    check_has_tokens(before, "shrinking" if given.shrink else "growth")
    if given.tokens:
        tokens = parse_tokens(given.tokens, before.tokens)
    else:
        tokens = tokens_for(before, parse_count(given.target_params), given.shrink)
    changes = {"model": {"tokens": tokens.model_dump()}, "checkpoint": {"load": str(given.save.absolute())}}
    tree = merge(own.model_dump(mode="json"), changes)
    for text in given.overrides:
        merge(tree, parse_override(text))
    return validate(RunConfig, tree, str(source))


def print_losses(opened: Evaluation, before: list[Score], path: Path) -> list[dict[str, Any]]:
    """Measure the new checkpoint as the old one was, print the change, and return both losses of each."""
    again = open_evaluation(path, [score.name for score in before], **asdict(opened.reading))
    found = []
    for old, new in zip(before, evaluate(again, "fp32")):
        change = new.val_loss - old.val_loss
        print(f"  loss on {old.name}: {old.val_loss:.6f} before, {new.val_loss:.6f} after ({change:+.1e})")
        found.append({"data": old.name, "before": old.val_loss, "after": new.val_loss, "tokens": old.tokens})
    return found


def tell_how_to_measure(target: RunConfig, source: Path, path: str) -> None:
    """Print the commands that tell what the change of the function cost."""
    prefixes = [prefix for _, prefix in target.data.validation] or ["PREFIX"]
    data = [word for prefix in prefixes for word in ("--data", prefix)]
    print("what it cost:")
    for load in (str(source), path):
        print(as_started(f"  python tools/evaluate.py {shlex.join(['--load', load, *data])}"))


def tell_next_stage(given: argparse.Namespace, target: RunConfig) -> None:
    """Print the command that trains on; without a config of the user's, write the one that it needs."""
    config, rest = given.config, [*given.overrides, f"checkpoint.load={given.save}"]
    if config is None:
        config = str(given.save / "config.yaml")
        replace_durably(given.save / "config.yaml", dump_config(target))
        own = any(text.startswith("run_dir=") for text in given.overrides)
        rest = [] if own else ["run_dir=ANOTHER_FOLDER"]
    words = shlex.join(["--config", config, *rest])
    print(f"next stage:\n  deepspeed --module megatron_tokenformer.training.pretrain {words}")


if __name__ == "__main__":
    run_cli(main)
