"""Draw validation loss or perplexity of runs and schedules against cumulative cost, on logarithmic axes.

Costs add up over the stages of a schedule.  A diamond is a growth.  Of one schedule alone, each stage has a
colour.
"""

from __future__ import annotations

from pathlib import Path

from megatron_tokenformer.commands.plotting import outputs, plot_parser, write
from megatron_tokenformer.errors import run_cli
from megatron_tokenformer.evaluation.charts import scaling_chart
from megatron_tokenformer.evaluation.curves import read_curves

EPILOG = """\
examples:
  # a progressive schedule against a model of the final size from scratch
  python tools/plot_scaling.py runs/ladder runs/from-scratch --label progressive --label "from scratch" \\
      --output scaling.png

  # loss against tokens, as a page to look into
  python tools/plot_scaling.py runs/ladder runs/from-scratch --x tokens --y val_loss --output scaling.html
"""


def main(argv: list[str] | None = None) -> int:
    """Read the runs, draw them."""
    parser = plot_parser(__doc__, EPILOG)
    parser.add_argument(
        "--x", choices=["flops", "tokens", "seconds"], default="flops", help="the x axis (default: flops)"
    )
    parser.add_argument(
        "--y", choices=["val_ppl", "val_loss"], default="val_ppl", help="the y axis (default: val_ppl)"
    )
    given = parser.parse_args(argv)
    paths = outputs(given, Path("scaling.png"))
    curves = read_curves(given.folders, given.label)
    write(scaling_chart(curves, given.x, given.y, given.title), curves, paths)
    return 0


if __name__ == "__main__":
    run_cli(main)
