"""Plots of predictions beside measurements, where matplotlib is installed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .calibrate import Row
from .published import CUDNN, SEQLENS, UPSTREAM
from .report import Cell

STYLE = {"ours": ("tab:blue", "-", "o"), "upstream": ("tab:orange", "-", "s")}


def _figure(rows: int, columns: int) -> tuple[Any, list[Any]]:
    try:
        from matplotlib.figure import Figure  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        print("no plot, since matplotlib is missing: pip install matplotlib")
        return None, []
    figure = Figure(figsize=(3.6 * columns, 3.1 * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def predictions(path: Path, cells: Sequence[Cell], title: str) -> None:
    """Predicted TFLOP/s over length, a panel a head dimension and mask, with what was measured."""
    panels = [cells[i : i + len(SEQLENS)] for i in range(0, len(cells), len(SEQLENS))]
    figure, axes = _figure(2, len(panels) // 2)
    if figure is None:
        return
    order = [p for p in panels if not p[0].causal] + [p for p in panels if p[0].causal]
    for axis, part in zip(axes, order, strict=True):
        _panel(axis, part)
    axes[1].legend(fontsize=7)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=85)
    print(f"drawn: {path}")


def _panel(axis: Any, part: Sequence[Cell]) -> None:
    plot = axis.plot
    one = part[0]
    for who, (color, line, marker) in STYLE.items():
        found = [(c.seqlen, c.found[who].tflops) for c in part if who in c.found]
        if found:
            plot(
                *zip(*found, strict=True),
                line,
                color=color,
                marker=marker,
                label=f"{who}, predicted",
            )
    measured = UPSTREAM.get((one.arch, one.head_dim, one.causal), ())
    if measured and one.head_dim == one.head_dim_v:
        label = "upstream, measured by its author"
        plot(SEQLENS[: len(measured)], measured, "kx", label=label)
    if one.arch == "sm_100a" and (one.head_dim, one.causal) in CUDNN:
        figures = CUDNN[one.head_dim, one.causal]
        plot(SEQLENS[1:], figures, "k:", label="cuDNN 9.22 on GB200, published")
    axis.set_xscale("log", base=2)
    axis.set_xticks(SEQLENS, [f"{s // 1024}k" for s in SEQLENS])
    axis.set_ylim(bottom=0)
    dims = f"d {one.head_dim}" + ("/128" if one.head_dim != one.head_dim_v else "")
    mask = "causal" if one.causal else "dense"
    axis.set_title(f"{dims} {mask}, TFLOP/s", fontsize=9)
    axis.grid(alpha=0.3)


def agreement(path: Path, groups: Mapping[str, Sequence[Row]]) -> None:
    """Predicted over measured TFLOP/s, a point each."""
    figure, axes = _figure(1, 1)
    if figure is None:
        return
    axis = axes[0]
    most = 0.0
    for name, rows in groups.items():
        x, y = [r.measured for r in rows], [r.predicted.tflops for r in rows]
        axis.plot(x, y, "o", markersize=3, label=name)
        most = max([most, *x, *y])
    axis.plot([0, most], [0, most], "k-", linewidth=0.7)
    axis.fill_between([0, most], [0, 0.9 * most], [0, 1.1 * most], alpha=0.12, color="k")
    axis.set_xlabel("measured TFLOP/s")
    axis.set_ylabel("predicted")
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=85)
    print(f"drawn: {path}")
