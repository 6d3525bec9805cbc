"""The loss, perplexity and bits per byte of a checkpoint on datasets, whatever layout wrote it.

Each token of a dataset but the first is predicted once, in windows that do not overlap, in order.  Documents
are isolated, and positions left out of the loss, as in the validation of the run that wrote the checkpoint.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tokenformer.commands.options import LOAD, add_model_arguments
from megatron_tokenformer.config.schema import Parallel, resolve_precision
from megatron_tokenformer.config.sizes import parameter_count
from megatron_tokenformer.errors import run_cli
from megatron_tokenformer.parallel.environment import find_processes
from megatron_tokenformer.parallel.telling import tell
from megatron_tokenformer.quiet import quiet_imports

if TYPE_CHECKING:
    from megatron_tokenformer.evaluation.perplexity import Evaluation, Score
    from megatron_tokenformer.parallel.layout import Layout

EPILOG = """\
Bits per byte are the loss of the whole text over its UTF-8 bytes, and so comparable between tokenizers.  The
bytes are those in the dataset's description PREFIX.json; for a part of a dataset, that part of them.

examples:
  python tools/evaluate.py --load runs/tokenformer-124m --data data/pile-validation_text_document

  # the components of the Pile, split by preprocess_data.py --split-by: a row for each, and the total
  python tools/evaluate.py --load runs/tokenformer-124m/checkpoints/step-00010000 \\
      --data data/val_arxiv_text_document --data data/val_github_text_document --json

  # on 8 GPUs, each with the whole model and its share of the windows
  torchrun --nproc-per-node 8 tools/evaluate.py --load runs/tokenformer-124m --data PREFIX
"""
READING = (
    *("sequence_length", "micro_batch_size", "max_tokens"),
    *("isolate_documents", "eod_mask_loss", "eod_id"),
)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--load", required=True, help=LOAD)
    add(
        "--data",
        required=True,
        action="extend",
        nargs="+",
        metavar="PREFIX",
        help="datasets, each named without .bin; may be given again",
    )
    add("--max-tokens", type=int, metavar="N", help="only the first N predicted tokens of each dataset")
    config = "(default: as in the checkpoint's config)"
    add("--sequence-length", type=int, metavar="N", help=f"tokens in a window {config}")
    add("--micro-batch-size", type=int, metavar="N", help=f"windows at once, in each process {config}")
    switch = argparse.BooleanOptionalAction
    add("--isolate-documents", action=switch, help=f"attend to the same document only {config}")
    add("--eod-mask-loss", action=switch, help=f"leave out what follows the end of a document {config}")
    add("--eod-id", type=int, metavar="ID", help="what ends a document (default: config or description)")
    add_model_arguments(parser)
    add("--json", action="store_true", help="print all figures as one JSON object in the last line")
    add("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # given by launchers, unused
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Join the other processes, if there are any, evaluate, and print the scores."""
    given = parse(argv)
    try:
        evaluate_and_print(given)
    except Exception as error:
        return tell(error)
    return 0


def evaluate_and_print(given: argparse.Namespace) -> None:
    """Evaluate as one of the processes that a launcher started, or alone."""
    processes = find_processes()
    layout = None
    if processes.world_size > 1:
        with quiet_imports():
            from megatron_tokenformer.parallel import layout as layouts
        layout = layouts.start(Parallel(), processes)
    # torch takes a second, so --help does without.
    from megatron_tokenformer.evaluation.load import one_device
    from megatron_tokenformer.evaluation.perplexity import evaluate

    opened = open_everywhere(given, layout)
    device = layout.device if layout else one_device()
    given.precision = resolve_precision(given.precision, device.type)
    scores = evaluate(opened, given.precision, layout)
    if layout is None or layout.is_main:
        report(given, opened, scores)
    if layout is not None:
        layouts.stop()  # not after a failure: it would wait for ranks that still wait for this one


def open_everywhere(given: argparse.Namespace, layout: Layout | None) -> Evaluation:
    """Open checkpoint and data on every rank; what the main rank finds is everyone's checkpoint.

    Raises:
        UserError: the main rank's mistake, which is likely everyone's, or names the ranks that cannot.
    """
    from megatron_tokenformer.evaluation.perplexity import open_evaluation

    reading = {key: getattr(given, key) for key in READING}
    if layout is None:
        return open_evaluation(given.load, given.data, given.verify, **reading)
    from megatron_tokenformer.parallel.layout import from_main_rank, on_all_ranks

    def open_on_main_rank() -> Path:
        return open_evaluation(given.load, given.data, given.verify, **reading).stored.path

    path = from_main_rank(open_on_main_rank)
    opened: list[Evaluation] = []
    on_all_ranks(lambda: opened.append(open_evaluation(path, given.data, **reading)))
    return opened[0]


def report(given: argparse.Namespace, opened: Evaluation, scores: list[Score]) -> None:
    """Print a row for each dataset and one for all."""
    from megatron_tokenformer.evaluation.perplexity import total

    whole = total(scores)
    stored = opened.stored
    size = parameter_count(stored.config.model)
    print(f"{stored.path}: step {stored.manifest.step}, {size:,} parameters")
    print(f"windows of {opened.reading.sequence_length} tokens, precision {given.precision}")
    rows = [*scores, whole] if len(scores) > 1 else scores
    width = max(len(score.name) for score in rows)
    print(f"{'dataset':<{width}}{'tokens':>16}{'loss':>10}{'perplexity':>18}{'bits per byte':>15}")
    for score in rows:
        told = score.as_json()
        bits = "-" if score.bits_per_byte is None else f"{score.bits_per_byte:.4f}"
        print(
            f"{score.name:<{width}}{score.tokens:>16,}{score.val_loss:>10.4f}{told['val_ppl']:>18,.6g}{bits:>15}"
        )
    unknown = [score.name for score in scores if score.bytes is None]
    if unknown:
        print(f"note: no bits per byte: no description tells the text_bytes of {', '.join(unknown)}")
    if given.json:
        each = [{"data": score.name, **score.as_json()} for score in scores]
        about = {"checkpoint": str(stored.path), "step": stored.manifest.step, "parameters": size}
        print(json.dumps({**whole.as_json(), **about, "datasets": each}))


if __name__ == "__main__":
    run_cli(main)
