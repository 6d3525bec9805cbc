"""Print what is in a checkpoint, or in a folder of them, and verify that its files are what was written."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_tokenformer.checkpoint.inspection import (
    Inspection,
    as_json,
    count_parameters,
    inspect_path,
    tensor_rows,
)
from megatron_tokenformer.checkpoint.manifest import Manifest
from megatron_tokenformer.commands.command_line import CommandParser
from megatron_tokenformer.errors import UserError, printable, run_cli

EXAMPLE = """examples:
  python tools/inspect_checkpoint.py runs/124m                                   # lists its checkpoints
  python tools/inspect_checkpoint.py runs/124m/checkpoints/step-00002000         # one of them
  python tools/inspect_checkpoint.py runs/124m/checkpoints/step-00002000 --tensors --verify

Manifests, sizes and structure are always checked; --verify reads all files and compares their hashes.

exit codes: 0 sound, 1 damaged (with file and reason), 2 wrong usage or no complete checkpoint
"""
CONFIG_KEYS = {
    "model": (
        "architecture",
        "layers",
        "hidden_size",
        "attention_heads",
        "tokens",
        "score_norm",
        "vocab_size",
    ),
    "data": ("sequence_length",),
    "training": ("steps", "global_batch_size", "precision", "seed"),
    "optimizer": ("lr", "schedule", "warmup_steps"),
}
SHOWN_SHARDS = 16
MEANS = {"norms": "norm", "reach": "|K| |V|"}
"""what the history tells by role, as means over all layers"""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(__doc__, EXAMPLE)
    add = parser.add_argument
    add("path", metavar="DIR", type=Path, help="a checkpoint, a folder of them, or a run's folder")
    add("--tensors", action="store_true", help="list every tensor (default: those of a role together)")
    add("--verify", action="store_true", help="read all files and compare their hashes")
    add("--json", action="store_true", help="print one JSON object as the last line")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Inspect, print, and say by the exit code whether all is sound."""
    given = parse_arguments(argv)
    found = inspect_path(given.path, given.verify)
    alone = len(found) == 1 and found[0].path == given.path
    if alone:
        print_checkpoint(found[0], given.tensors)
    else:
        print_folder(found)
    damages = [damage for inspection in found for damage in inspection.damages]
    for damage in damages:
        print(f"DAMAGED: {damage}")
    complete = [inspection for inspection in found if inspection.kind == "checkpoint"]
    if complete and not damages:
        left_out = "" if given.verify else " (files were not read; --verify compares their hashes)"
        print(
            f"sound: manifests, sizes and intervals agree{' and so do hashes' if given.verify else left_out}"
        )
    if given.json:
        told = [as_json(inspection) for inspection in found]
        print(json.dumps(told[0] if alone else {"path": str(given.path), "checkpoints": told}))
    if damages:
        more = f" (and {len(damages) - 1} more)" if len(damages) > 1 else ""
        raise UserError(f"{damages[0]}{more}", exit_code=1)
    if not complete:
        raise UserError(f"nothing complete at {given.path}: {what_is_left(found)}")
    return 0


def what_is_left(found: list[Inspection]) -> str:
    """Where no checkpoint is complete: what there is, and what becomes of it."""
    spared = [inspection.path.name for inspection in found if inspection.manifest]
    if spared:
        return f"{spared[-1]} is, but was set aside; a run that starts there gives it its name back"
    return ", ".join(f"{inspection.path.name} ({inspection.kind})" for inspection in found)


def print_folder(found: list[Inspection]) -> None:
    """A line for each checkpoint, and for what is left of dead saves."""
    rows = [("checkpoint", "step", "written", "size", "val_loss", "parameters", "")]
    for inspection in found:
        manifest = inspection.manifest
        note = "damaged" if inspection.damages else "" if inspection.kind == "checkpoint" else inspection.kind
        rows.append(
            (
                inspection.path.name,
                f"{manifest.step:,}" if manifest else "",
                inspection.time,
                _size(inspection.bytes),
                _number(manifest.val_loss) if manifest else "",
                f"{count_parameters(manifest):,}" if manifest else "",
                ", ".join(filter(None, ("latest" if inspection.latest else "", note))),
            )
        )
    print(found[0].path.parent)
    _print_table(rows)


def print_checkpoint(found: Inspection, tensors: bool) -> None:
    """Everything about one checkpoint."""
    print(f"{found.path}: {_size(found.bytes)}, written {found.time}{', latest' if found.latest else ''}")
    manifest = found.manifest
    if manifest is None:
        return
    facts = {
        "step": f"{manifest.step:,} (Adam's {manifest.adam_step:,}), {manifest.position:,} samples seen",
        "loss": f"{_number(manifest.loss)}, validation {_number(manifest.val_loss)}",
        "spent": f"{manifest.totals['tokens']:,.0f} tokens, {manifest.totals['flops']:.3g} FLOPs",
        "parameters": f"{count_parameters(manifest):,}, as {', '.join(manifest.states)} in fp32",
        "written by": _value(manifest.layout or "unknown"),
        "tau": ", ".join(f"{printable(role)} {_course(tau)}" for role, tau in manifest.taus.items())
        or "none",
        "tokenizer": printable(manifest.tokenizer or "unknown"),
    }
    for key, value in facts.items():
        print(f"  {key:<11}{value}")
    for section, keys in CONFIG_KEYS.items():
        there = manifest.config.get(section, {})
        print(f"  {section:<11}" + ", ".join(f"{key} {_value(there[key])}" for key in keys if key in there))
    for prefix, count in manifest.source_tokens.items():
        print(f"  data source {printable(prefix)}, {count:,} tokens")
    print_history(manifest.history)
    print_tensors(manifest, tensors)
    print_shards(manifest)


def print_history(history: list[dict[str, Any]]) -> None:
    """The growths and shrinkings that led here, first to last; entries may hold anything."""
    for number, entry in enumerate(history, start=1):
        time, source = _value(entry.get("time")), _value(entry.get("from"))
        print(f"  {entry.get('kind', 'growth')} {number}: {time} from {source}")
        before = {key.removesuffix("_before"): key for key in entry if key.endswith("_before")}
        for name, key in before.items():
            print(f"    {printable(name)} {_value(entry[key])} -> {_value(entry.get(f'{name}_after'))}")
        rest = {
            key: value
            for key, value in entry.items()
            if key not in ("kind", "time", "from", *MEANS) and not key.endswith(("_before", "_after"))
        }
        print(f"    {_pairs(rest)}")
        for key, what in MEANS.items():
            roles = entry.get(key)
            for role, means in roles.items() if isinstance(roles, dict) else ():
                told = _pairs(means) if isinstance(means, dict) else _value(means)
                print(f"    mean {what}, {printable(role)}: {told.replace('_', ' ')}")


def print_tensors(manifest: Manifest, each: bool) -> None:
    """What is stored of each tensor, or of each role."""
    rows: list[tuple[str, ...]] = [("tensor", "shape", "tensors", "parameters", "bytes", "intervals")]
    for row in tensor_rows(manifest, by_role=not each):
        shape = " x ".join(map(str, row.shape))
        counts = (row.tensors, row.parameters, row.bytes, row.intervals)
        rows.append((row.name, shape, *(f"{count:,}" for count in counts)))
    _print_table(rows)


def print_shards(manifest: Manifest) -> None:
    """The files that hold the tensors."""
    rows = [("shard", "bytes", "intervals", "hash")]
    for shard in manifest.shards[:SHOWN_SHARDS]:
        rows.append((shard.file, f"{shard.size:,}", f"{len(shard.intervals):,}", printable(shard.hash)))
    _print_table(rows)
    if len(manifest.shards) > SHOWN_SHARDS:
        print(f"  and {len(manifest.shards) - SHOWN_SHARDS:,} more shards (--json lists them)")


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:]))]
        print(f"  {'  '.join(cells)}".rstrip())


def _size(count: int) -> str:
    return f"{tqdm.format_sizeof(count)}B"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.6f}"


def _course(tau: dict[str, float]) -> str:
    to = f" -> {tau['end']:.4f} over {tau['steps']:.0f} steps" if tau["steps"] else ""
    return f"{tau['start']:.4f}{to}"


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{printable(key)} {_value(value)}" for key, value in values.items())


def _value(value: object) -> str:
    """What a manifest holds of any kind, on one line."""
    if isinstance(value, dict):
        return "/".join(f"{printable(key)}={_value(item)}" for key, item in value.items())
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if value >= 10_000 else str(value)
    return f"{value:.6g}" if isinstance(value, float) else printable("none" if value is None else value)


if __name__ == "__main__":
    run_cli(main)
