"""The loss, perplexity and bits per byte of a checkpoint on datasets, and its figures on zero-shot tasks.

The checkpoint may be of any layout.  Each token of a dataset (--data) but the first is predicted once, in
windows that do not overlap, in order.  Documents are isolated, and positions left out of the loss, as in the
validation of the run that wrote the checkpoint.  Tasks (--tasks) are those of lm-evaluation-harness.
"""

from __future__ import annotations

import argparse
import json
import sys
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tokenformer.commands.command_line import CommandParser
from megatron_tokenformer.commands.options import LOAD, add_model_arguments, check_output
from megatron_tokenformer.config.schema import Parallel, resolve_precision
from megatron_tokenformer.config.sizes import parameter_count
from megatron_tokenformer.durable import replace_durably
from megatron_tokenformer.errors import run_cli
from megatron_tokenformer.parallel.environment import find_processes
from megatron_tokenformer.parallel.telling import tell
from megatron_tokenformer.quiet import quiet_imports

if TYPE_CHECKING:
    from megatron_tokenformer.data.tokenizers import Tokenizer
    from megatron_tokenformer.evaluation.load import Stored
    from megatron_tokenformer.evaluation.perplexity import Evaluation, Score
    from megatron_tokenformer.evaluation.zero_shot import TaskSettings
    from megatron_tokenformer.parallel.layout import Layout

EPILOG = """\
Bits per byte are the loss of the whole text over its UTF-8 bytes, and so comparable between tokenizers.  The
bytes are those in the dataset's description PREFIX.json; for a part of a dataset, that part of them.

examples:
  python tools/evaluate.py --load runs/tokenformer-124m --data data/pile-validation_text_document

  # the components of the Pile, split by preprocess_data.py --split-by: a row for each, and the total
  python tools/evaluate.py --load runs/tokenformer-124m/checkpoints/step-00010000 \\
      --data 'data/val_*_text_document' --json

  # the columns of the paper's table; documents come from the Hugging Face hub, or its cache
  python tools/evaluate.py --load runs/tokenformer-124m --output zero-shot.json \\
      --tasks lambada_openai,hellaswag,piqa,arc_easy,arc_challenge,winogrande

  # on 8 GPUs, each with the whole model and its share of the windows and requests
  torchrun --nproc-per-node 8 tools/evaluate.py --load runs/tokenformer-124m --data PREFIX --tasks piqa
"""
TASK_OPTIONS = ("include_path", "num_fewshot", "limit", "sequence_length")
BOOTSTRAP = 1_000
"""draws for the standard error of a perplexity"""
READING = (
    *("sequence_length", "micro_batch_size", "max_tokens"),
    *("isolate_documents", "eod_mask_loss", "eod_id"),
)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(__doc__, EPILOG)
    add = parser.add_argument
    add("--load", required=True, help=LOAD)
    add(
        "--data",
        default=[],
        action="extend",
        nargs="+",
        metavar="PREFIX",
        help="datasets, each named without .bin, or by a pattern in quotes; may be given again",
    )
    add("--max-tokens", type=int, metavar="N", help="only the first N predicted tokens of each dataset")
    add("--tasks", type=names, default=(), metavar="NAME,...", help="tasks, groups or tags of the harness")
    add("--include-path", metavar="DIR", help="a folder of more tasks, as the harness's YAML files")
    add("--num-fewshot", type=int, metavar="N", help="examples before a question (default: the task's or 0)")
    add("--limit", type=int, metavar="N", help="only the first N documents of each task, for trials")
    add("--batch-size", type=batch_size, metavar="N", help="requests at once (default: auto, what fits)")
    add("--output", type=Path, metavar="FILE", help="write all that the harness found, as JSON")
    add("--tokenizer-model", metavar="FILE", help="the tokenizer's file (default: where the checkpoint says)")
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
    given = parser.parse_args(argv)
    given.data = [prefix for pattern in given.data for prefix in expand(pattern)]
    if not given.data and not given.tasks:
        parser.error("nothing to evaluate on: give --data PREFIX, --tasks NAME,... or both")
    of_tasks = ("include_path", "num_fewshot", "limit", "batch_size", "output", "tokenizer_model")
    idle = [f"--{key.replace('_', '-')}" for key in of_tasks if getattr(given, key) is not None]
    if idle and not given.tasks:
        parser.error(f"{', '.join(idle)} without --tasks")
    return given


def expand(pattern: str) -> list[str]:
    """The datasets that a pattern names, in order of name; a plain name, or one of nothing, as it is."""
    found = sorted(path.removesuffix(".idx") for path in glob(f"{pattern}.idx"))
    return found or [pattern]


def names(text: str) -> tuple[str, ...]:
    """`a,b` as names."""
    return tuple(name for part in text.split(",") if (name := part.strip()))


def batch_size(text: str) -> int | None:
    """A number, or None for `auto`."""
    return None if text == "auto" else int(text)


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
    from megatron_tokenformer.evaluation.zero_shot import evaluate_tasks, open_tasks

    settings = task_settings(given) if given.tasks else None
    opened = open_everywhere(given, layout)
    tokenizer = open_tokenizer(given, opened.stored, layout) if settings else None
    device = layout.device if layout else one_device()
    given.precision = resolve_precision(given.precision, device.type)
    is_main = layout is None or layout.is_main
    told = told_about(opened.stored)
    if is_main:
        print(f"{told['checkpoint']}: step {told['step']}, {told['parameters']:,} parameters", flush=True)
    # Before anything is computed, so that a mistake in their names costs nothing.
    tasks = open_tasks(settings, layout) if settings else None
    figures: dict[str, Any] = {}
    results = None
    try:
        if given.data:
            scores = evaluate(opened, given.precision, layout)
            if is_main:
                figures |= report(given, opened, scores)
        if settings and tokenizer:
            results = evaluate_tasks(opened.stored, tokenizer, settings, tasks, given.precision, layout)
            if results is not None:
                figures |= report_tasks(given, results)
    finally:  # whatever cannot be done, nothing that was found is lost
        conclude(given, figures and figures | told, results)
    if layout is not None:
        layouts.stop()  # not after a failure: it would wait for ranks that still wait for this one


def task_settings(given: argparse.Namespace) -> TaskSettings:
    """What the options ask for.

    Raises:
        UserError: the harness is not there, or a number is too small.
    """
    from megatron_tokenformer.evaluation.zero_shot import TaskSettings

    wanted = {key: getattr(given, key) for key in TASK_OPTIONS}
    return TaskSettings(given.tasks, rows=given.batch_size, bootstrap=BOOTSTRAP, **wanted)


def open_tokenizer(given: argparse.Namespace, stored: Stored, layout: Layout | None) -> Tokenizer:
    """The checkpoint's tokenizer, on every rank.

    Raises:
        UserError: there is none, or it is another one.
    """
    from megatron_tokenformer.evaluation.load import checkpoint_tokenizer

    def load() -> Tokenizer:
        return checkpoint_tokenizer(stored, given.tokenizer_model)

    if layout is None:
        return load()
    from megatron_tokenformer.parallel.layout import each_rank

    return each_rank(load)


def open_everywhere(given: argparse.Namespace, layout: Layout | None) -> Evaluation:
    """Open checkpoint and data on every rank; what the main rank finds is everyone's checkpoint.

    The main rank, which alone writes, makes sure that --output can be written.

    Raises:
        UserError: the main rank's mistake, which is likely everyone's, or names the ranks that cannot.
    """
    from megatron_tokenformer.evaluation.perplexity import open_evaluation

    reading = {key: getattr(given, key) for key in READING}

    def open_on_main_rank() -> Evaluation:
        if given.output:
            check_output(given.output)
        return open_evaluation(given.load, given.data, given.verify, **reading)

    if layout is None:
        return open_on_main_rank()
    from megatron_tokenformer.parallel.layout import each_rank, from_main_rank

    path = from_main_rank(lambda: open_on_main_rank().stored.path)
    return each_rank(lambda: open_evaluation(path, given.data, **reading))


def told_about(stored: Stored) -> dict[str, Any]:
    """What a report says first."""
    size = parameter_count(stored.config.model)
    return {"checkpoint": str(stored.path), "step": stored.manifest.step, "parameters": size}


def report(given: argparse.Namespace, opened: Evaluation, scores: list[Score]) -> dict[str, Any]:
    """Print a row for each dataset and one for all; the figures as JSON."""
    from megatron_tokenformer.evaluation.perplexity import total

    whole = total(scores)
    print(f"windows of {opened.reading.sequence_length} tokens, precision {given.precision}")
    rows = [*scores, whole] if len(scores) > 1 else scores
    width = max(len(score.name) for score in rows)
    parts = max(len(score.component or "") for score in rows)
    beside = max(parts, len("component")) + 2 if parts else 0
    head = f"{'dataset':<{width}}{'component'[:beside]:>{beside}}"
    print(f"{head}{'tokens':>16}{'loss':>10}{'perplexity':>18}{'bits per byte':>15}")
    for score in rows:
        told = score.as_json()
        bits = "-" if score.bits_per_byte is None else f"{score.bits_per_byte:.4f}"
        print(
            f"{score.name:<{width}}{score.component or '-' * bool(beside):>{beside}}"
            f"{score.tokens:>16,}{score.val_loss:>10.4f}{told['val_ppl']:>18,.6g}{bits:>15}"
        )
    unknown = [score.name for score in scores if score.bytes is None]
    if unknown:
        print(f"note: no bits per byte: no description tells the text_bytes of {', '.join(unknown)}")
    sys.stdout.flush()  # tasks may take hours, and a launcher may kill this process meanwhile
    each = [{"data": score.name, "component": score.component, **score.as_json()} for score in scores]
    return {**whole.as_json(), "datasets": each}


def report_tasks(given: argparse.Namespace, results: dict[str, Any]) -> dict[str, Any]:
    """Print every figure, and the paper's columns where there are any; the figures as JSON."""
    from megatron_tokenformer.evaluation.zero_shot import figures, paper_columns

    found = figures(results)
    width = max(map(len, found))
    for name, value in found.items():
        if "_stderr" not in name:
            error = found.get(f"{name}_stderr")
            print(f"{name:<{width}}{value:>12,.4f}" + (f" +- {error:.4f}" if error is not None else ""))
    columns = paper_columns(found)
    if any(value is not None for value in columns.values()):
        cells = ["-" if value is None else f"{value:.2f}" for value in columns.values()]
        print("  ".join(columns))
        print("  ".join(f"{cell:>{len(column)}}" for column, cell in zip(columns, cells)))
    if given.limit is not None:
        print(f"note: of the first {given.limit} documents of each task only")
    return {"tasks": found, "table": columns}


def conclude(given: argparse.Namespace, figures: dict[str, Any], results: dict[str, Any] | None) -> None:
    """Print the figures as JSON and write what the harness found, each even if the other cannot be done."""
    try:
        if figures and given.json:
            print(json.dumps(figures), flush=True)
    finally:
        if results is not None and given.output:
            replace_durably(given.output, json.dumps(results, indent=1, default=str) + "\n")


if __name__ == "__main__":
    run_cli(main)
