"""Convert the weights of a model from one format into another, and compare what both compute.

official: a checkpoint of the published Tokenformers, or of their training code.  native: a checkpoint of this
program, of any layout; --to native writes one at step 0, without an optimizer's state, which trains on, grows
and is evaluated like any other.  hf: a folder that Hugging Face transformers loads (and --to hf needs), with
the model's own code in it.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tokenformer.commands.command_line import CommandParser
from megatron_tokenformer.config.sizes import parameter_count
from megatron_tokenformer.errors import UserError, run_cli

if TYPE_CHECKING:  # torch takes a second, so --help does without
    from torch import Tensor

    from megatron_tokenformer.checkpoint.portable import PortableModel

EPILOG = """\
Memory holds one tensor at a time (with --to hf one file, of 5 GB at most), and for the comparison one model,
which --no-verify leaves out.  What fails the comparison is not kept.

The source is computed by this program.  With --to hf the folder's own code computes the other side; with --to
native it is this program again, so equal logits show that writing lost nothing, and not that the source was
understood.

examples:
  # published weights: pytorch_model.bin, with its YAML beside it or named
  python tools/convert_checkpoint.py --from official --load TokenFormer-150M --yaml 150M_eval.yml \\
      --to native --save runs/150m/init

  # what the published training code wrote: latest, global_step143000/layer_*-model_states.pt, .../configs
  python tools/convert_checkpoint.py --from official --load work_dirs/150M/checkpoints \\
      --to native --save runs/150m/init

  # for Hugging Face transformers, of any checkpoint of a run; and back, say after training there
  python tools/convert_checkpoint.py --from native --load runs/124m --to hf --save 124m-hf
  python tools/convert_checkpoint.py --from hf --load 124m-hf --to native --save runs/124m-back

  # and then
  python tools/evaluate.py --load runs/150m/init --data data/pile-validation_text_document
  python tools/grow_checkpoint.py --load runs/150m/init --target-params 450M --save runs/450m/init
  deepspeed --module megatron_tokenformer.training.pretrain --config configs/tokenformer-150m.yaml \\
      checkpoint.load=runs/150m/init
"""
PROMPT = (2, 64)
"""sequences and tokens of the prompt that both models compute"""


@dataclass(frozen=True)
class Format:
    """How a format is read, written, and asked for logits; None where it cannot be."""

    read: Callable[[argparse.Namespace], PortableModel] | None
    write: Callable[[PortableModel, Path, argparse.Namespace], Path] | None
    """into a folder; returns what was written"""
    logits: Callable[[Path, Tensor], Tensor] | None
    """of what was written, for ids [b, s]: [b, s, v] in fp32, by the code that users of the format run"""


def _read_official(given: argparse.Namespace) -> PortableModel:
    from megatron_tokenformer.checkpoint.official import read_official

    return read_official(given.load, given.yaml)


def _read_native(given: argparse.Namespace) -> PortableModel:
    from megatron_tokenformer.checkpoint.portable import read_native

    return read_native(given.load)


def _read_hf(given: argparse.Namespace) -> PortableModel:
    from megatron_tokenformer.huggingface.read import read_hf

    return read_hf(Path(given.load))


def _write_native(portable: PortableModel, folder: Path, given: argparse.Namespace) -> Path:
    from megatron_tokenformer.checkpoint.portable import write_native

    return write_native(portable, folder)


def _write_hf(portable: PortableModel, folder: Path, given: argparse.Namespace) -> Path:
    from megatron_tokenformer.huggingface.export import write_hf

    print(write_hf(portable, folder, given.dtype).told)
    return folder


def _native_logits(path: Path, ids: Tensor) -> Tensor:
    from megatron_tokenformer.checkpoint.portable import read_native

    return logits_of(read_native(path), ids)


def _hf_logits(path: Path, ids: Tensor) -> Tensor:
    from megatron_tokenformer.huggingface.export import hf_logits

    return hf_logits(path, ids)


FORMATS = {
    "official": Format(_read_official, None, None),
    "native": Format(_read_native, _write_native, _native_logits),
    "hf": Format(_read_hf, _write_hf, _hf_logits),
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(__doc__, EPILOG)
    add = parser.add_argument
    readable, writable = ([n for n, f in FORMATS.items() if getattr(f, key)] for key in ("read", "write"))
    add("--from", dest="source", required=True, choices=readable, help="the format of what is there")
    add("--to", dest="target", required=True, choices=writable, help="the format to write")
    add("--load", required=True, metavar="DIR", help="where it is; of several checkpoints the newest")
    add("--save", required=True, type=Path, metavar="DIR", help="a folder, new or empty, for what is written")
    add(
        "--yaml",
        nargs="+",
        action="extend",
        type=Path,
        default=[],
        metavar="FILE",
        help="with --from official: the model's config, if it is not beside the weights",
    )
    add("--tokenizer-model", metavar="FILE", help="the tokenizer's file (default: where the model says)")
    add(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        help="with --to hf: of the weights in the folder (default: %(default)s); the comparison rounds the "
        "source's weights to it, and computes in fp32",
    )
    add("--no-verify", action="store_true", help="do not run both models on a prompt to compare their logits")
    add(
        "--tolerance",
        type=float,
        default=1e-5,
        metavar="X",
        help="largest difference of logits, as a share of the largest logit or of 1 (default: %(default)s)",
    )
    add("--json", action="store_true", help="print all figures as one JSON object in the last line")
    given = parser.parse_args(argv)
    if given.source == given.target:
        raise UserError(
            f"--from {given.source} --to {given.target} converts nothing; a copy of the folder does"
        )
    if given.yaml and given.source != "official":
        raise UserError(f"--yaml goes with --from official; what is {given.source} has its config in itself")
    if given.dtype != "fp32" and given.target != "hf":
        raise UserError(f"--dtype goes with --to hf; a checkpoint that is {given.target} holds fp32")
    if not 0.0 <= given.tolerance < math.inf:
        raise UserError(f"--tolerance {given.tolerance} is no share of a logit; give 0 or more, as 1e-5")
    return given


def main(argv: list[str] | None = None) -> int:
    """Convert, compare, and print what was written."""
    given = parse(argv)
    from megatron_tokenformer.checkpoint.portable import check_new
    from megatron_tokenformer.checkpoint.step_zero import check_writable

    check_new(given.save)
    save = given.save.resolve()  # whose name what is written gets at the end
    if save.is_mount():
        raise UserError(f"{given.save} is where a disk is mounted; give a new folder in it")
    unverified = save.with_name(f".{save.name}.unverified")
    check_writable(unverified, f"convert {given.load} into {given.save}")
    shutil.rmtree(unverified, ignore_errors=True)  # what a conversion that was killed has left
    try:
        convert(given, unverified)
        give_name(unverified, save)
    finally:
        shutil.rmtree(unverified, ignore_errors=True)
    return 0


def convert(given: argparse.Namespace, folder: Path) -> None:
    """Write the model into a folder, compare, and print the figures, also of a comparison that fails.

    Raises:
        UserError: it cannot be read or written, or computes something else.
    """
    from megatron_tokenformer.evaluation.load import DTYPES

    start = time.perf_counter()
    source, target = FORMATS[given.source], FORMATS[given.target]
    assert source.read and target.write and target.logits  # what parse lets through
    portable = source.read(given)
    if given.tokenizer_model:
        portable = with_tokenizer_at(portable, given.tokenizer_model)
    if given.dtype != "fp32":
        portable = portable.rounded(DTYPES[given.dtype])
    written = target.write(portable, folder, given)
    path = given.save / written.relative_to(folder)
    figures = describe(given, portable, path) | {"seconds": round(time.perf_counter() - start, 3)}
    report(figures)
    if not given.no_verify:
        figures["logits"] = compare(portable, written, target.logits)
        print_comparison(figures["logits"])
    if given.json:
        print(json.dumps(figures))
    if not given.no_verify and not figures["logits"]["share"] <= given.tolerance:
        raise UserError(
            f"what was written does not compute what {given.load} does, so there is no {given.save}; "
            f"--no-verify would write it all the same",
            exit_code=1,
        )


def give_name(written: Path, folder: Path) -> None:
    """Put what is written and compared where it belongs; the place is free, or `check_new` lets it pass.

    Raises:
        UserError: the place has been taken meanwhile, or cannot be written.
    """
    from megatron_tokenformer.checkpoint.store import clear_leftovers
    from megatron_tokenformer.durable import sync_folder

    clear_leftovers(folder)
    try:
        written.replace(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}", exit_code=1) from None


def with_tokenizer_at(portable: PortableModel, file: str) -> PortableModel:
    """A model whose tokenizer's file is elsewhere than it says.

    Raises:
        UserError: nothing tells the kind of tokenizer, or the file is not that of the data.
    """
    from megatron_tokenformer.evaluation.load import open_tokenizer

    if portable.tokenizer is None:
        raise UserError(f"nothing at {portable.origin} tells the kind of tokenizer that {file} is of")
    try:
        open_tokenizer(portable.tokenizer, portable.model.vocab_size, portable.made_with, file)
    except UserError as error:
        raise UserError(f"{portable.origin}: {error}", error.exit_code) from None
    moved = portable.tokenizer.model_copy(update={"model": str(Path(file).absolute())})
    return replace(portable, tokenizer=moved)


def describe(given: argparse.Namespace, portable: PortableModel, path: Path) -> dict[str, Any]:
    """The figures of a conversion."""
    return {
        "from": given.source,
        "to": given.target,
        "load": given.load,
        "path": str(path),
        "parameters": parameter_count(portable.model),
        "model": portable.model.model_dump(mode="json"),
        "taus": portable.taus,
        "sequence_length": portable.sequence_length,
        "tokenizer": portable.tokenizer.model_dump() if portable.tokenizer else None,
    }


def report(figures: dict[str, Any]) -> None:
    """Print them for people."""
    model, tokenizer = figures["model"], figures["tokenizer"]
    print(f"{figures['load']} ({figures['from']}) -> {figures['path']} ({figures['to']})")
    print(
        f"  {figures['parameters']:,} parameters: {model['layers']} layers x {model['hidden_size']}, "
        f"{model['attention_heads']} heads, vocabulary {model['vocab_size']:,}"
    )
    if figures["taus"]:
        roles = " / ".join(f"{tokens:,}" for tokens in model["tokens"].values())
        taus = " / ".join(f"{tau:.3f}" for tau in figures["taus"].values())
        print(f"  tokens {roles}, tau {taus}, {model['score_norm']}")
    made_with = f"{tokenizer['type']} {tokenizer['model'] or ''}".strip() if tokenizer else "unknown"
    print(f"  sequence length {figures['sequence_length']:,}; tokenizer: {made_with}")


def compare(
    portable: PortableModel, path: Path, logits: Callable[[Path, Tensor], Tensor]
) -> dict[str, float]:
    """How far the logits of what was written are from those of what was read, on a fixed prompt.

    Returns:
        The largest logit, the largest difference, and that as a `share` of the largest logit or of 1.

    Raises:
        UserError: the logits of the model that was read are NaN or infinite.
    """
    import torch

    length = min(PROMPT[1], portable.sequence_length)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(portable.model.vocab_size, (PROMPT[0], length), generator=generator)
    before, after = logits_of(portable, ids), logits(path, ids)
    largest = before.abs().max().item()
    if not math.isfinite(largest):
        raise UserError(
            "the model's logits are NaN or infinite: the weights that were read are broken", exit_code=1
        )
    difference = (after - before).abs().nan_to_num(nan=torch.inf).max().item()
    return {"largest": largest, "difference": difference, "share": difference / max(1.0, largest)}


def logits_of(portable: PortableModel, ids: Tensor) -> Tensor:
    """What a model computes for ids [b, s], in fp32 by our own code: [b, s, v], on the CPU."""
    import torch

    from megatron_tokenformer.evaluation.load import assemble

    with torch.inference_mode():
        return assemble(portable, torch.device("cpu"))(ids).transpose(0, 1)


def print_comparison(figures: dict[str, float]) -> None:
    """Print it for people."""
    size = f"largest logit {figures['largest']:.2f}"
    print(f"  largest difference of logits {figures['difference']:.1e}, {size}, on a prompt of random tokens")


if __name__ == "__main__":
    run_cli(main)
