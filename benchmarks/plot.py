"""Bar charts of what a benchmark measured, where matplotlib is installed."""

from collections.abc import Mapping, Sequence
from pathlib import Path


def bars(
    path: Path, labels: Sequence[str], series: Mapping[str, Sequence[float]], unit: str
) -> None:
    """Draw one group of bars a label and one bar a series to `path` (PNG).

    Args:
        labels: what was measured, one a group.
        series: name -> a figure for each label; NaN leaves a gap.
        unit: of the figures.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot, since matplotlib is missing: pip install matplotlib")
        return
    figure = Figure(figsize=(2 + 0.9 * len(labels), 5), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(series)
    for i, (name, figures) in enumerate(series.items()):
        places = [group + (i - (len(series) - 1) / 2) * width for group in range(len(labels))]
        axes.bar(places, figures, width, label=name)
    axes.set_xticks(range(len(labels)), labels, rotation=35, ha="right")
    axes.set_ylabel(unit)
    axes.legend()
    figure.savefig(path, dpi=120)
    print(f"drawn: {path}")
