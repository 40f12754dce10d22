"""Tables, plots and a timeline of the timing model.

usage: python -m ptx_emulator.timing [--fit] [--only b200 gb300 h200 grid] [--arch sm_103a]
                                      [--output DIR]
       python -m ptx_emulator.timing --trace FILE [--kernel upstream --head-dim 128 --causal]

Kernels are compiled and recorded in the emulator at first, then taken from .cache/timing.
"""

import argparse
import json
import warnings
from pathlib import Path

from .. import bootstrap
from . import h200, plots, published, report, timeline
from .calibrate import Model, Point, Row, fit
from .problems import Kernel, lowered
from .replay import replay
from .table import FITTED_NAMES, machine_of

PARTS = ("b200", "gb300", "h200", "grid")
# What --fit tries: a grid of values a constant.
RANGES: dict[str, tuple[float, ...]] = {
    "mma_latency": (60, 120, 180, 240),
    "tmem_latency": (15, 30, 60, 90),
    "sync_latency": (10, 20, 40, 60),
    "cta_cycles": (0, 250, 500, 1000),
    "tma_latency": (400, 550, 700),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--fit", action="store_true", help="search the fitted constants again")
    parser.add_argument("--output", type=Path, default=Path("build/timing"))
    parser.add_argument("--trace", type=Path, help="write the timeline of one CTA, and no tables")
    parser.add_argument("--arch", default="sm_100a", choices=("sm_100a", "sm_103a"))
    parser.add_argument("--kernel", default="ours", choices=("ours", "upstream"))
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--causal", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    bootstrap()
    if options.trace:
        trace(options)
        return
    options.output.mkdir(parents=True, exist_ok=True)
    if options.fit:
        refit()
    print("## Constants\n", report.constants(), sep="\n")
    groups: dict[str, list[Row]] = {}
    models = {}
    for part, arch, points in (
        ("b200", "sm_100a", published.points("sm_100a")),
        ("gb300", "sm_103a", published.points("sm_103a")),
        ("h200", h200.ARCH, h200.points()),
    ):
        if part in options.only:
            models[arch] = Model(machine_of(arch))
            groups[part] = table_of(part, models[arch], points)
    if "grid" in options.only:
        compare(options, models)
    if groups:
        plots.agreement(options.output / "agreement.png", groups)
        write_json(options.output / "rows.json", groups)


def table_of(part: str, model: Model, points: list[Point]) -> list[Row]:
    """Print what was measured beside what is predicted."""
    rows = model.rows(points)
    print(f"\n## {part}\n\n{report.residuals(rows)}\n\n{report.errors(rows)}\n")
    print(report.cost_table(model, list(dict.fromkeys(row.kernel for row in rows))))
    return rows


def compare(options: argparse.Namespace, models: dict[str, Model]) -> None:
    """Print and draw predictions for ours and upstream's."""
    model = models.get(options.arch) or Model(machine_of(options.arch))
    cells, missing = report.grid(model)
    print(f"\n## Predicted: ours / upstream\n\n{report.comparison(cells)}\n")
    if not missing:
        print(f"## Dense, {report.FLOOR_SEQLEN} tokens: what is left\n\n{report.floors(model)}\n")
    kernels = [kernel for kernel in model.kernels if kernel.who in ("ours", "upstream")]
    print(report.cost_table(model, kernels))
    for line in missing:
        print(f"not predicted: {line}")
    card = {"sm_100a": "B200", "sm_103a": "GB300"}[options.arch]
    title = f"{card} forward, bf16, 32768 tokens: PREDICTED by the timing model, not measured"
    plots.predictions(options.output / "predictions.png", cells, title)


def refit() -> None:
    """Search the fitted constants on the fitted half of B200's points, and print them."""
    found = fit(Model(machine_of("sm_100a")), published.points("sm_100a"), RANGES)
    print("fitted:", {name: found[name] for name in FITTED_NAMES})


def trace(options: argparse.Namespace) -> None:
    """Write the timeline of the longest recorded run."""
    d = options.head_dim
    kernel = Kernel(options.kernel, options.arch, d, d, options.causal)
    machine = machine_of(options.arch)
    one = lowered(kernel, machine)
    streams = max(one.streams, key=lambda found: len(found.code))
    timeline.write(options.trace, streams, replay(streams, machine, traced=True))
    print(f"written: {options.trace}, {kernel.name}; open it in ui.perfetto.dev")


def write_json(path: Path, groups: dict[str, list[Row]]) -> None:
    rows = [
        {
            "part": part, "kernel": row.kernel.name, "batch": row.problem.batch,
            "seqlen": row.problem.seqlen, "measured": row.measured, "fitted": row.fitted,
            "predicted": round(row.predicted.tflops, 1), "error": round(row.error, 4),
        }
        for part, found in groups.items()
        for row in found
    ]  # fmt: skip
    path.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
