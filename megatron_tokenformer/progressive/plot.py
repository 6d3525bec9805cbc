"""The picture of a schedule: validation loss against cumulative training FLOPs, one colour per stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PLOT = "loss_vs_flops.png"
Curve = tuple[str, list[dict[str, Any]]]


def plot_losses(curves: list[Curve], path: Path) -> bool:
    """Draw evaluation rows (`step`, `flops`, `val_loss`) of each stage; False if there is nothing to draw.

    The first stage's row at 0 FLOPs has no place on a logarithmic axis and is left out.
    """
    drawn = [(name, [row for row in rows if row["flops"] > 0]) for name, rows in curves]
    drawn = [(name, rows) for name, rows in drawn if rows]
    if not drawn:
        return False
    import matplotlib  # half a second, and only needed here

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for index, (name, rows) in enumerate(drawn):
        flops, losses = [row["flops"] for row in rows], [row["val_loss"] for row in rows]
        colour = f"C{index % 10}"
        axes.plot(flops, losses, marker="o", markersize=3, color=colour, label=name)
        if name != curves[0][0] and rows[0]["step"] == 0:
            axes.axvline(flops[0], color=colour, linestyle=":", linewidth=1)
            axes.plot(flops[0], losses[0], marker="D", markersize=8, color=colour, fillstyle="none")
    axes.plot([], [], marker="D", color="grey", fillstyle="none", linestyle=":", label="growth")
    axes.set_xscale("log")
    axes.set_xlabel("cumulative training FLOPs")
    axes.set_ylabel("validation loss (nats per token)")
    axes.grid(alpha=0.3, which="both")
    axes.legend(title="stage")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True
