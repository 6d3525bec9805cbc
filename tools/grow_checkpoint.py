"""Grow a checkpoint: append parameter tokens, by default without changing what the model computes.

The target size is `model.tokens` of --config, or is given by --tokens or --target-params.  By default new
keys are zero, tau is kept and the optimizer's state is carried: the grown model's loss is that of the old
one, and it trains on from there.
"""

from __future__ import annotations

import argparse
import json
import shlex
import time
from pathlib import Path
from typing import Any

from megatron_tokenformer.checkpoint.grow import carry_out, grown_taus
from megatron_tokenformer.checkpoint.growth_plan import GrowthPlan, check_space, in_bytes, plan_growth
from megatron_tokenformer.checkpoint.manifest import read_manifest
from megatron_tokenformer.checkpoint.store import find_checkpoint
from megatron_tokenformer.config.growth import Growth, changes_of_function
from megatron_tokenformer.config.load import dump_config, load_config, merge, parse_override, validate
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.config.sizes import parameter_count
from megatron_tokenformer.config.target_size import parse_count, parse_tokens, tokens_for
from megatron_tokenformer.durable import replace_durably
from megatron_tokenformer.errors import UserError, run_cli
from megatron_tokenformer.model.tau import taus_from_json, taus_to_json

EPILOG = """\
example:
  python tools/grow_checkpoint.py --load runs/124m/checkpoints --config configs/tokenformer-354m.yaml \\
      --save runs/354m/init
  deepspeed --module megatron_tokenformer.training.pretrain --config configs/tokenformer-354m.yaml \\
      run_dir=runs/354m checkpoint.load=runs/354m/init

  # no config for the next size: the rest is then the checkpoint's own config, written to SAVE/config.yaml
  python tools/grow_checkpoint.py --load runs/124m --target-params 757M --save runs/757m/init \
      run_dir=runs/757m

  # what it would take, without writing anything
  python tools/grow_checkpoint.py --load runs/124m --tokens qkv=2144,output=2144,ffn=8576 \
      --save runs/354m/init --dry-run

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
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--config", help="run config of the next stage; its model.tokens are the target")
    size.add_argument("--tokens", metavar="qkv=N,output=N,ffn=N", help="the target; a role left out stays")
    size.add_argument(
        "--target-params",
        metavar="N",
        help="about this many parameters, such as 757M: all roles in proportion, in multiples of 32 tokens",
    )
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
    add(
        "--old-token-noise",
        type=float,
        default=0.0,
        metavar="STD",
        help="add normal noise to the old keys and values (default: 0; inexact)",
    )
    add("--allow-inexact", action="store_true", help="grow a softmax model although its function changes")
    add("--link", action="store_true", help="hard-link the old shards instead of copying, where possible")
    add(
        "--no-verify", action="store_true", help="with --link: do not read the old shards to check their hash"
    )
    add("--dry-run", action="store_true", help="print sizes, and write nothing")
    add("--json", action="store_true", help="print all figures as one JSON object in the last line")
    given = parser.parse_args(argv)
    if given.no_verify and not given.link:
        raise UserError("--no-verify goes with --link; copying checks every hash on the way, at no cost")
    return given


def main(argv: list[str] | None = None) -> int:
    """Grow, and print what was done and how to go on."""
    given = parse(argv)
    rule = validate(Growth, {key: getattr(given, key) for key in Growth.model_fields}, "growth")
    source = find_checkpoint(given.load)
    target = target_config(given, source)
    plan = plan_growth(source, target, given.save, rule, link=given.link, verify=not given.no_verify)
    figures = describe(plan)
    if given.dry_run:
        report(plan, figures)
        check_space(plan, link=plan.link and plan.one_file_system)
    else:
        start = time.perf_counter()
        grown = carry_out(plan)
        seconds = round(time.perf_counter() - start, 3)
        figures |= {"path": str(grown.path), "seconds": seconds, "old_rows": grown.old_rows}
        figures["norms"] = grown.manifest.history[-1]["norms"]
        report(plan, figures)
        tell_next_stage(given, target)
    if given.json:
        print(json.dumps(figures))
    return 0


def target_config(given: argparse.Namespace, source: Path) -> RunConfig:
    """The run config of the grown model: the one given, or the checkpoint's own with more tokens."""
    if given.config:
        return load_config(given.config, given.overrides)
    stored = read_manifest(source).config
    before = validate(RunConfig, stored, str(source)).model
    if given.tokens:
        tokens = parse_tokens(given.tokens, before.tokens)
    else:
        tokens = tokens_for(before, parse_count(given.target_params))
    tree = merge(stored, {"model": {"tokens": tokens.model_dump()}, "checkpoint": {"load": str(given.save)}})
    for text in given.overrides:
        merge(tree, parse_override(text))
    return validate(RunConfig, tree, str(source))


def describe(plan: GrowthPlan) -> dict[str, Any]:
    """The figures of a growth, known before it begins; sizes in bytes."""
    model = plan.target.model
    reasons = changes_of_function(model, plan.rule)
    linked = plan.link and plan.one_file_system
    return {
        "from": str(plan.source),
        "step": plan.old.step,
        "path": None,
        "tokens_before": plan.before.tokens.model_dump(),
        "tokens_after": model.tokens.model_dump(),
        "parameters_before": parameter_count(plan.before),
        "parameters_after": parameter_count(model),
        "taus": taus_to_json(grown_taus(taus_from_json(plan.old.taus), plan.old.step, model, plan.rule)),
        **plan.rule.model_dump(),
        "exact": not reasons,
        "inexact_because": reasons,
        "old_rows": "linked" if linked else "copied",
        "bytes_old": plan.old_bytes,
        "bytes_new": plan.new_bytes,
        "bytes_free_before": plan.free_bytes,
    }


def report(plan: GrowthPlan, figures: dict[str, Any]) -> None:
    """Print a growth, done or planned: sizes, tau, optimizer, exactness, bytes."""
    done = f"grew {plan.source} (step {plan.old.step}) to {figures['path']}"
    print(done if figures["path"] else f"would grow {plan.source} (step {plan.old.step}) into {plan.folder}")
    print(f"  parameters {figures['parameters_before']:,} -> {figures['parameters_after']:,}")
    print(f"  {'tokens':<8}{'old rows':>10}{'new rows':>10}{'in all':>10}{'tau':>16}")
    for role, after in figures["tokens_after"].items():
        before, tau = figures["tokens_before"][role], figures["taus"][role]
        course = f"{tau['start']:.2f}" + (f" -> {tau['end']:.2f}" if tau["steps"] else "")
        print(f"  {role:<8}{before:>10,}{after - before:>10,}{after:>10,}{course:>16}")
    print(f"  new keys {figures['keys']}, new values {figures['values']}, optimizer {figures['optimizer']}")
    for role, norms in figures.get("norms", {}).items():
        told = (f"{key.replace('_', ' ')} {value:.3g}" for key, value in norms.items() if value is not None)
        print(f"  mean norm, {role}: {', '.join(told)}")
    reasons = figures["inexact_because"]
    print(f"  the function changes: {'; '.join(reasons)}" if reasons else "  exact: the function is the same")
    old, new = in_bytes(figures["bytes_old"]), in_bytes(figures["bytes_new"])
    print(f"  old rows {old}, {figures['old_rows']}; new rows {new}, written", end="")
    if figures["path"]:
        speed = (figures["bytes_old"] + figures["bytes_new"]) / figures["seconds"]
        print(f"; {figures['seconds']:.1f} s, {in_bytes(int(speed))}/s")
    else:
        print(f"; {in_bytes(figures['bytes_free_before'])} are free on that disk")


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
