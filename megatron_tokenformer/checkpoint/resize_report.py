"""What a growth, a widening or a shrinking is and came to, as figures and in words."""

from __future__ import annotations

from typing import Any

from megatron_tokenformer.checkpoint.grow import grown_taus
from megatron_tokenformer.checkpoint.growth_plan import GrowthPlan
from megatron_tokenformer.checkpoint.net2net import WideningPlan
from megatron_tokenformer.checkpoint.resize import sizes
from megatron_tokenformer.checkpoint.shrink import ShrinkPlan, shrunk_taus
from megatron_tokenformer.checkpoint.step_zero import in_bytes
from megatron_tokenformer.config.growth import WIDTHS, changes_of_function, changes_of_widening
from megatron_tokenformer.model.tau import taus_from_json, taus_to_json

AnyPlan = GrowthPlan | WideningPlan | ShrinkPlan


def describe(plan: AnyPlan) -> dict[str, Any]:
    """The figures that are known before it begins; sizes in bytes.

    Whether a shrinking is exact is not: that takes reading the tokens.
    """
    model = plan.target.model
    if isinstance(plan, GrowthPlan):
        reasons = changes_of_function(model, plan.rule)
        taus = grown_taus(taus_from_json(plan.old.taus), plan.old.step, model, plan.rule)
        own = {
            "exact": not reasons,
            "inexact_because": reasons,
            "old_rows": plan.old_rows,
            "bytes_old": plan.old_bytes,
        }
    elif isinstance(plan, WideningPlan):
        reasons = changes_of_widening(plan.before, model)
        taus = {}
        own = {"exact": not reasons, "inexact_because": reasons, "bytes_old": plan.stored_bytes}
    else:
        taus = shrunk_taus(plan)
        own = {"exact": None, "bytes_old": plan.stored_bytes}
    return {
        "kind": plan.kind,
        "from": str(plan.source),
        "step": plan.old.step,
        "path": None,
        **sizes(plan),
        "taus": taus_to_json(taus),
        **plan.rule.model_dump(),
        **own,
        "bytes_new": plan.new_bytes,
        "bytes_free_before": plan.free_bytes,
    }


def report(plan: AnyPlan, figures: dict[str, Any]) -> None:
    """Print a growth or a shrinking, done or planned: sizes, tau, optimizer, exactness, bytes."""
    if figures["path"]:
        done = "shrank" if isinstance(plan, ShrinkPlan) else "grew"
        print(f"{done} {plan.source} (step {plan.old.step}) to {figures['path']}")
    else:
        print(f"would {plan.verb} {plan.source} (step {plan.old.step}) into {plan.folder}")
    print(f"  parameters {figures['parameters_before']:,} -> {figures['parameters_after']:,}")
    if isinstance(plan, WideningPlan):
        _report_widening(figures)
    else:
        _report_tokens(figures, "new rows" if isinstance(plan, GrowthPlan) else "dropped")
        (_report_growth if isinstance(plan, GrowthPlan) else _report_shrink)(figures)
    if figures["path"]:
        speed = (figures["bytes_old"] + figures["bytes_new"]) / figures["seconds"]
        print(f"; {figures['seconds']:.1f} s, {in_bytes(int(speed))}/s")
    else:
        print(f"; {in_bytes(figures['bytes_free_before'])} are free on that disk")


def _report_tokens(figures: dict[str, Any], changed: str) -> None:
    print(f"  {'tokens':<8}{'old rows':>10}{changed:>10}{'in all':>10}{'tau':>16}")
    for role, after in figures["tokens_after"].items():
        before, tau = figures["tokens_before"][role], figures["taus"][role]
        course = f"{tau['start']:.2f}" + (f" -> {tau['end']:.2f}" if tau["steps"] else "")
        print(f"  {role:<8}{before:>10,}{abs(after - before):>10,}{after:>10,}{course:>16}")


def _report_growth(figures: dict[str, Any]) -> None:
    print(f"  new keys {figures['keys']}, new values {figures['values']}, optimizer {figures['optimizer']}")
    _report_means("norm", figures.get("norms", {}))
    _report_exactness(figures)
    old, new = in_bytes(figures["bytes_old"]), in_bytes(figures["bytes_new"])
    print(f"  old rows {old}, {figures['old_rows']}; new rows {new}, written", end="")


def _report_widening(figures: dict[str, Any]) -> None:
    for key in WIDTHS:
        print(f"  {key.replace('_', ' ')} {figures[f'{key}_before']:,} -> {figures[f'{key}_after']:,}")
    spread, optimizer = figures["spread"], figures["optimizer"]
    print(f"  channels are copied, shares of what reads them spread by {spread:g}, optimizer {optimizer}")
    _report_exactness(figures)
    print(f"  {in_bytes(figures['bytes_old'])}, read; {in_bytes(figures['bytes_new'])}, written", end="")


def _report_exactness(figures: dict[str, Any]) -> None:
    reasons = figures["inexact_because"]
    print(f"  the function changes: {'; '.join(reasons)}" if reasons else "  exact: the function is the same")


def _report_shrink(figures: dict[str, Any]) -> None:
    print(f"  those of least |K| |V| go, tau is kept, optimizer {figures['optimizer']}")
    _report_means("|K| |V|", figures.get("reach", {}))
    if figures["exact"] is not None:
        same = "exact: the function is the same, for all that went had zero keys"
        print(f"  {same if figures['exact'] else 'the function changes: tokens that had weight are gone'}")
    print(f"  {in_bytes(figures['bytes_old'])}, read; {in_bytes(figures['bytes_new'])}, written", end="")


def _report_means(what: str, roles: dict[str, dict[str, float | None]]) -> None:
    for role, means in roles.items():
        told = (f"{key.replace('_', ' ')} {value:.3g}" for key, value in means.items() if value is not None)
        print(f"  mean {what}, {role}: {', '.join(told)}")
