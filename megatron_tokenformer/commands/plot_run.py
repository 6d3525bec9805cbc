"""Draw a run, a schedule or several: losses, learning rate, gradient norm, throughput, and what happened.

Growths are dashed lines; skipped steps, spikes and rollbacks are marks at the foot of the loss.  Of several
folders, the curves are laid over each other.
"""

from __future__ import annotations

from pathlib import Path

from megatron_tokenformer.commands.plotting import outputs, plot_parser, write
from megatron_tokenformer.errors import UserError, run_cli
from megatron_tokenformer.evaluation.charts import X_LABELS, run_chart
from megatron_tokenformer.evaluation.curves import read_curves

EPILOG = """\
examples:
  # RUN_DIR/plot.png; a run that is not finished can be drawn too
  python tools/plot_run.py runs/tokenformer-124m

  # a whole schedule, its stages one after the other, also as a page to look into
  python tools/plot_run.py runs/pile-124m-to-1.4b --html

  # two runs over each other, against tokens, as a page alone
  python tools/plot_run.py runs/a runs/b --label "lr 1e-3" --label "lr 3e-4" --x tokens --output both.html
"""


def main(argv: list[str] | None = None) -> int:
    """Read the runs, draw them."""
    parser = plot_parser(__doc__, EPILOG)
    parser.add_argument("--x", choices=list(X_LABELS), default="step", help="the x axis (default: step)")
    parser.add_argument(
        "--smooth", type=int, metavar="N", help="rows in running means (default: 1 %% of the rows; 1: none)"
    )
    given = parser.parse_args(argv)
    if given.smooth is not None and given.smooth < 1:
        raise UserError(f"--smooth {given.smooth} is no number of rows; 1 draws the rows alone")
    paths = outputs(given, Path(given.folders[0]) / "plot.png")
    curves = read_curves(given.folders, given.label)
    write(run_chart(curves, given.x, given.smooth, given.title), curves, paths)
    return 0


if __name__ == "__main__":
    run_cli(main)
