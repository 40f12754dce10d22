"""Tables of the model: its constants, how far it is off, and what it predicts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .calibrate import Model, Row, summary
from .grid import Prediction, predict
from .problems import BLOCK, Costs, Kernel, Runs
from .published import SEQLENS, problem_of
from .replay import TENSOR_UNIT, replay
from .table import CONSTANTS, FAMILIES, OVERRIDES

FLOOR_SEQLEN = 2048
DIMENSIONS = ((64, 64), (128, 128), (192, 128), (256, 256))


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def constants() -> str:
    """The machines, as table.py has them."""
    rows = []
    for name, (hopper, blackwell, source) in CONSTANTS.items():
        other = f"{OVERRIDES[name][0]:g}" if name in OVERRIDES else f"{blackwell:g}"
        where = f"{source}; sm_103: {OVERRIDES[name][1]}" if name in OVERRIDES else source
        rows.append([name, f"{hopper:g}", f"{blackwell:g}", other, where])
    return table(["constant", *(arch[:-1] for arch in FAMILIES), "source"], rows)


def residuals(rows: Sequence[Row]) -> str:
    """Each point beside its prediction."""
    lines = [
        [
            row.kernel.name,
            f"{row.problem.batch} x {row.problem.seqlen}",
            "fitted" if row.fitted else "held out",
            f"{row.measured:.0f}",
            f"{row.predicted.tflops:.0f}",
            f"{100 * row.error:+.1f} %",
        ]
        for row in rows
    ]
    return table(["kernel", "b x s", "", "measured", "predicted", "error"], lines)


def errors(rows: Sequence[Row]) -> str:
    """Median and worst error, of fitted points and of the others."""
    lines = []
    for name, chosen in (
        ("fitted", [row for row in rows if row.fitted]),
        ("held out", [row for row in rows if not row.fitted]),
    ):
        if chosen:
            found = summary(chosen)
            lines.append(
                f"{name}: {found['points']} points, median error {100 * found['median']:.1f} %, "
                f"worst {100 * found['worst']:.1f} %"
            )
    return "\n".join(lines)


@dataclass(frozen=True)
class Cell:
    """One problem of the grid: what is predicted for both kernels."""

    arch: str
    head_dim: int
    head_dim_v: int
    causal: bool
    seqlen: int
    found: dict[str, Prediction]

    @property
    def ratio(self) -> float:
        """Ours over upstream; NaN where one is missing."""
        both = [self.found[who].tflops for who in ("ours", "upstream") if who in self.found]
        return both[0] / both[1] if len(both) == 2 else float("nan")


def grid(model: Model, who: Sequence[str] = ("ours", "upstream")) -> tuple[list[Cell], list[str]]:
    """Predictions over head dimensions, masks and lengths, and what could not be predicted."""
    from flash_attn4_cute.sm100.pairing import sees_enough

    cells: list[Cell] = []
    missing: list[str] = []
    machine = model.machine
    for d, d_v in DIMENSIONS:
        for causal in (False, True):
            costs: dict[Kernel, tuple[Runs, Costs] | None] = {}
            for seqlen in SEQLENS:
                problem = problem_of(d, d_v, causal, seqlen)
                found = {}
                for name in who:
                    pairs = name == "ours" and causal and sees_enough(d, seqlen, seqlen)
                    kernel = Kernel(name, machine.arch, d, d_v, causal, pairs)
                    if kernel not in costs:
                        costs[kernel] = _costs(model, kernel, missing)
                    known = costs[kernel]
                    if known is not None:
                        found[name] = predict(problem, *known, machine)
                cells.append(Cell(machine.arch, d, d_v, causal, seqlen, found))
    return cells, missing


def _costs(model: Model, kernel: Kernel, missing: list[str]) -> tuple[Runs, Costs] | None:
    """What a kernel's tiles are and cost; None, and a line in `missing`, where it has no runs."""
    try:
        one = model.lowered(kernel)
        return one.runs, one.costs(model.machine)
    except Exception as error:
        missing.append(f"{kernel.name}: {str(error).splitlines()[0][:100]}")
        return None


def floors(model: Model, seqlen: int = FLOOR_SEQLEN) -> str:
    """Ours without a mask, and the least that its tensor core would take, over upstream's.

    Two floors, both in the launch's waves and with its fixed costs, but without a CTA's start and
    with a tensor core that never pauses: for the products and what shared memory adds to them in
    the replays, and for the products alone.
    """
    machine, lines = model.machine, []
    for d, d_v in DIMENSIONS:
        problem = problem_of(d, d_v, False, seqlen)
        ours = model.lowered(Kernel("ours", machine.arch, d, d_v, False))
        upstream = model.lowered(Kernel("upstream", machine.arch, d, d_v, False))
        other = predict(problem, upstream.runs, upstream.costs(machine), machine).tflops
        runs, rows = ours.runs, ours.runs.rows // ours.runs.ctas
        busy = [replay(one, machine).busy[0][TENSOR_UNIT] for one in ours.streams]
        left = np.array([(run.tiles, run.blocks) for run in runs.runs], float)
        tile, block = map(float, np.linalg.lstsq(left, np.array(busy), rcond=None)[0])
        products = 2 * rows * BLOCK * (d + d_v) / machine["tensor_flops"]
        row = [machine.arch[:-1], f"{d}" if d == d_v else f"{d}/{d_v}", f"{other:.0f}"]
        for costs in (
            ours.costs(machine),
            Costs(0.0, tile, block),
            Costs(0.0, 0.0, products),
        ):
            found = predict(problem, runs, costs, machine).tflops
            cycles = f"{costs.start:.0f} + {costs.tile:.0f} + {costs.block:.0f}"
            row.append(f"{found:.0f} = {found / other:.2f} ({cycles})")
        lines.append(row)
    heads = ["card", "d", "upstream", "ours: start + tile + block", "tensor core", "its products"]
    return table(heads, lines)


def comparison(cells: Sequence[Cell]) -> str:
    """Predicted TFLOP/s of ours and of upstream's kernel, and their quotient."""
    lines = []
    for first in range(0, len(cells), len(SEQLENS)):
        part = cells[first : first + len(SEQLENS)]
        one = part[0]
        dims = f"{one.head_dim}" if one.head_dim == one.head_dim_v else "192/128"
        row = [one.arch[:-1], dims, "causal" if one.causal else "dense"]
        for cell in part:
            values = [
                f"{cell.found[who].tflops:.0f}" if who in cell.found else "-"
                for who in ("ours", "upstream")
            ]
            row.append(f"{' / '.join(values)} = {cell.ratio:.2f}")
        lines.append(row)
    heads = ["card", "d", "mask", *(f"{seqlen // 1024}k" for seqlen in SEQLENS)]
    return table(heads, lines)


def cost_table(model: Model, kernels: Sequence[Kernel]) -> str:
    """What a tile and a block cost, and which unit is how busy in the longest run."""
    lines = []
    for kernel in kernels:
        one = model.lowered(kernel)
        costs, busy = one.costs(model.machine), one.busy(model.machine)
        shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in busy)
        lines.append([
            kernel.name, f"{one.runs.rows} x 128", f"{costs.block:.0f}", f"{costs.tile:.0f}",
            f"{costs.start:.0f}", shares,
        ])  # fmt: skip
    return table(["kernel", "rows x keys", "block", "tile", "start", "busiest units"], lines)
