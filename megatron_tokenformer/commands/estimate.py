"""Estimate a run before it starts: parameters, operations, memory by kind, traffic, bubble, and good layouts.

Nothing is run and no GPU is needed: all figures are formulas of the config.  Parameters, operations, bytes
held and bytes sent are exact or close to it; times rest on a few assumptions, which are printed.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_tokenformer.commands.command_line import CommandParser
from megatron_tokenformer.config.estimate import (
    Estimate,
    Hardware,
    assumptions,
    best_layouts,
    estimate,
    fits_into,
    parse_bytes,
)
from megatron_tokenformer.config.load import load_config
from megatron_tokenformer.config.pipeline_cut import describe_pipeline
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.config.sizes import (
    FORMULAS,
    device_peak,
    flops_per_token,
    parameter_count,
    resolved_precision,
    step_flops,
    tokens_per_step,
)
from megatron_tokenformer.errors import UserError, run_cli
from megatron_tokenformer.progressive.plan import load_plan

EPILOG = """\
examples:
  # one GPU, as configured
  python tools/estimate.py --config configs/tokenformer-124m.yaml

  # 64 GPUs of 80 GB: the config's own layout, and the best ones
  python tools/estimate.py --config configs/tokenformer-1.4b.yaml --gpus 64 parallel.tensor=2

  # another GPU and slower links; a device that is not in the table needs its peak
  python tools/estimate.py --config configs/tokenformer-1.4b.yaml --gpus 16 --gpu 'NVIDIA A100-SXM4-40GB' \\
      --gpu-memory 40GB --link-speed 150 --network-speed 10
  python tools/estimate.py --config configs/tokenformer-1.4b.yaml --gpus 16 --peak 400

  # every stage of a schedule, on several numbers of GPUs, as a Markdown table (docs/scaling.md)
  python tools/estimate.py --schedule configs/progressive/pile-124m-to-1.4b.yaml --gpus 8,64,1024
  python tools/estimate.py --schedule configs/progressive/pile-124m-to-1.4b.yaml \\
      common.training.global_batch_size=2048 stages.1.4b.config.training.steps=30000
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(__doc__, EPILOG)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", help="run config")
    what.add_argument("--schedule", help="progressive config: a table of the best layout of each stage")
    add(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="changes to the config; with --schedule to the schedule: common.section.key=value for all its "
        "stages, stages.NAME.config.section.key=value for one",
    )
    add(
        "--gpus",
        metavar="N",
        help="also look for the best layouts of N GPUs; with --schedule N,N,... (default: 8)",
    )
    add(
        "--layouts",
        type=int,
        metavar="K",
        help="how many layouts of N GPUs to show (default: 3; with --schedule 1)",
    )
    add_hardware_options(parser)
    add("--json", action="store_true", help="print all figures as one JSON object in the last line")
    return parser.parse_args(argv)


def add_hardware_options(parser: argparse.ArgumentParser) -> None:
    """The GPUs, and what lies between them."""
    add = parser.add_argument
    add(
        "--gpu",
        default="NVIDIA H100 80GB HBM3",
        metavar="NAME",
        help="as torch names it (default: %(default)s)",
    )
    add("--peak", type=float, metavar="TFLOPS", help="dense peak of the GPU in the run's precision")
    add("--gpu-memory", default="80GB", metavar="SIZE", help="of one GPU (default: %(default)s)")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="(default: %(default)s)")
    add(
        "--link-speed",
        type=float,
        default=200,
        metavar="GB/S",
        help="what a collective reaches per GPU and direction within a node (default: %(default)s)",
    )
    add(
        "--network-speed",
        type=float,
        default=20,
        metavar="GB/S",
        help="the same between nodes (default: %(default)s)",
    )
    add(
        "--efficiency",
        type=float,
        default=0.4,
        metavar="SHARE",
        help="share of the peak that computing reaches, at most 1 (default: %(default)s)",
    )
    add(
        "--launch-time",
        type=float,
        default=5,
        metavar="US",
        help="microseconds that launching a kernel takes; not measured (default: %(default)s)",
    )


def main(argv: list[str] | None = None) -> int:
    """Estimate, and print it."""
    given = parse(argv)
    if given.schedule:
        return table_of_stages(given)
    config = load_config(given.config, given.overrides)
    hardware = hardware_of(given, config)
    ranks = config.parallel.tensor * config.parallel.pipeline
    gpus = gpu_counts(str(ranks) if given.gpus is None else given.gpus)
    if len(gpus) > 1:
        raise UserError(f"--gpus {given.gpus} with --config; give one number, or --schedule")
    figures = model_figures(config) | {"assumptions": assumptions(hardware)}
    report_model(figures, config.model.architecture)
    print("assumed:", *figures["assumptions"], sep="\n  ")
    try:
        own = estimate(config, gpus[0], hardware)
    except UserError as refused:
        if given.gpus is None:
            raise
        print(f"as configured it does not run: {refused}")
    else:
        figures["as_configured"] = own.figures(hardware)
        report_layout("as configured", own, hardware)
    if given.gpus is not None:
        best = best_layouts(config, gpus[0], hardware, given.layouts or 3)
        if not best:
            print(f"nothing fits: no layout of {gpus[0]} GPUs divides the batch and keeps within the memory")
        for place, found in enumerate(best, start=1):
            report_layout(f"layout {place}", found, hardware)
        figures["layouts"] = [found.figures(hardware) for found in best]
    if given.json:
        print(json.dumps(figures))
    return 0


def gpu_counts(text: str) -> list[int]:
    """`8,64` as numbers.

    Raises:
        UserError: not positive numbers.
    """
    counts = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if not all(counts):
        raise UserError(
            f"--gpus {text or repr(text)} is not a number of GPUs; write one such as 8, or several, 8,16,64"
        )
    return counts


def hardware_of(given: argparse.Namespace, config: RunConfig) -> Hardware:
    """The GPUs that the command line describes.

    Raises:
        UserError: a device whose peak is not known, or a figure that is not a positive and finite one.
    """
    for option in (
        "peak",
        "gpus_per_node",
        "link_speed",
        "network_speed",
        "efficiency",
        "launch_time",
        "layouts",
    ):
        value = getattr(given, option)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{option.replace('_', '-')} {value} is not a finite number above 0")
    if given.efficiency > 1:
        raise UserError(
            f"--efficiency {given.efficiency} is more than all of the peak; write a share, such as 0.4"
        )
    precision = resolved_precision(config)
    peak = given.peak * 1e12 if given.peak else device_peak(given.gpu, precision)
    if precision == "fp32" and not given.peak:
        raise UserError("peaks are known in bf16 and fp16; give --peak TFLOPS for training.precision=fp32")
    if peak is None:
        raise UserError(
            f"the {precision} peak of --gpu '{given.gpu}' is not known; write it as "
            f"torch.cuda.get_device_name() prints it, such as 'NVIDIA H200', or give --peak TFLOPS"
        )
    return Hardware(
        peak=peak,
        memory=parse_bytes(given.gpu_memory),
        per_node=given.gpus_per_node,
        link=given.link_speed * 1e9,
        network=given.network_speed * 1e9,
        efficiency=given.efficiency,
        launch=given.launch_time / 1e6,
    )


def model_figures(config: RunConfig) -> dict[str, Any]:
    """What does not depend on GPUs."""
    steps = config.training.steps
    return {
        "parameters": parameter_count(config.model),
        "flops_per_token": flops_per_token(config.model, config.data.sequence_length),
        "tokens": steps * tokens_per_step(config),
        "flops": steps * step_flops(config),
    }


def report_model(figures: Mapping[str, Any], architecture: str) -> None:
    """Print what does not depend on GPUs."""
    print(f"parameters         {figures['parameters']:,}")
    print(f"operations         {figures['flops_per_token']:.4g} per token of training")
    print(f"                   = {FORMULAS[architecture]}")
    print(f"whole run          {figures['tokens']:,} tokens, {figures['flops']:.3g} operations")


def report_layout(title: str, found: Estimate, hardware: Hardware) -> None:
    """Print the estimate of one layout."""
    figures = found.figures(hardware)
    print(f"\n{title}: {found.gpus} GPU(s) as {layout_in_words(found)}")
    print(f"  {describe_pipeline(found.config, found.micro_batches)}")
    verdict = "fits" if fits_into(found, hardware) else "DOES NOT FIT"
    kinds = ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in found.memory.items() if size)
    print(f"  memory, GB       {found.memory_bytes / 1e9:.1f}, {verdict}: {kinds}")
    sent = ", ".join(f"{purpose} {size / 1e9:.2f}" for purpose, size in found.sent.items())
    print(f"  sent, GB/step    by a GPU: {sent}")
    parts = ", ".join(f"{part} {seconds:.3g}" for part, seconds in found.seconds.items())
    print(f"  step, s          {found.step_time:.3g}: {parts}")
    print(
        f"  speed            {figures['tokens_per_s']:,.0f} tokens/s, MFU {figures['mfu']:.1%}; "
        f"the run takes {figures['run_time_s'] / 3600:,.1f} hours"
    )


def layout_in_words(found: Estimate) -> str:
    """`tensor 2 with sequence, pipeline 4, data 8, micro-batch 4, recompute none`."""
    parallel, training = found.config.parallel, found.config.training
    sequence = " with sequence" if parallel.sequence else ""
    return (
        f"tensor {parallel.tensor}{sequence}, pipeline {parallel.pipeline}, data {found.data_ranks}, "
        f"micro-batch {training.micro_batch_size}, recompute {training.recompute}"
    )


def table_of_stages(given: argparse.Namespace) -> int:
    """Print the best layouts of every stage of a schedule on every number of GPUs, as a Markdown table."""
    stages = load_plan(Path(given.schedule), given.overrides).stages
    rows = []
    for stage in stages:
        hardware = hardware_of(given, stage.config)
        for gpus in gpu_counts("8" if given.gpus is None else given.gpus):
            best = best_layouts(stage.config, gpus, hardware, count=given.layouts or 1)
            found = [layout.figures(hardware) for layout in best] or [{"gpus": gpus}]
            rows += [{"stage": stage.name, **figures} for figures in found]
    print(*table(rows), sep="\n")
    if given.json:
        print(json.dumps({"stages": rows}))
    return 0


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table."""
    heads = [
        "stage",
        "GPUs",
        "tensor x pipeline x data",
        "micro-batch x number",
        "recompute",
        "bubble",
        "memory, GB",
        "sent, GB/step",
        "step, s",
        "tokens/s",
        "MFU",
        "hours",
    ]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        cells = [row["stage"], f"{row['gpus']:,}"]
        if "tensor" not in row:
            lines.append([*cells, "none fits", *["-"] * (len(heads) - 3)])
            continue
        lines.append(
            [
                *cells,
                f"{row['tensor']} x {row['pipeline']} x {row['data']}",
                f"{row['micro_batch_size']} x {row['micro_batches']}",
                row["recompute"],
                f"{row['bubble']:.0%}",
                f"{row['memory_bytes'] / 1e9:.0f}",
                f"{sum(row['sent_bytes_per_step'].values()) / 1e9:.1f}",
                f"{row['step_time_s']:.3g}",
                f"{row['tokens_per_s']:,.0f}",
                f"{row['mfu']:.0%}",
                f"{row['run_time_s'] / 3600:,.1f}",
            ]
        )
    return [f"| {' | '.join(cells)} |" for cells in lines]


if __name__ == "__main__":
    run_cli(main)
