"""Runs the kernel that the plan picks for an architecture, and compares it with float64.

The last line printed is one JSON object. The exit status is 0 if the result is right, 1 if it is
not or the emulator found a fault, 2 if the kernels do not provide what was asked.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from .. import Session, bootstrap, session
from ..counters import as_dicts, as_table
from ..findings import EmulationError
from ..trace import Trace
from .case import Case, Inputs, Verdict, judge, make_inputs, visible

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
OK, WRONG, REFUSED = 0, 1, 2
TILE, TILE_NAME = 128 * 128, "128 x 128 visible scores"


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser(prog="python -m ptx_emulator", description=__doc__)
    p.add_argument("--arch", default="sm120a", help="sm90a, sm100a, sm103a, sm120a or sm121a")
    p.add_argument("--kernel", default="ours", choices=("ours", "upstream"))
    p.add_argument("--dtype", default="bf16", choices=DTYPES)
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--heads", type=int, default=1)
    p.add_argument("--kv-heads", type=int, help="default: --heads")
    p.add_argument("--seqlen-q", type=int, default=128)
    p.add_argument("--seqlen-k", type=int, default=128)
    p.add_argument("--head-dim", type=int, default=128)
    p.add_argument("--head-dim-v", type=int, help="default: --head-dim")
    p.add_argument("--causal", action="store_true")
    p.add_argument("--window", type=int, nargs=2, metavar=("L", "R"), help="-1 is unbounded")
    p.add_argument("--softcap", type=float, default=0.0)
    p.add_argument("--sink", action="store_true", help="a learnable sink per head")
    p.add_argument("--varlen", action="store_true", help="packed sequences of drawn lengths")
    p.add_argument("--page-size", type=int, help="keys and values in pages of this many tokens")
    p.add_argument("--num-splits", type=int, default=1)
    p.add_argument("--seed", type=int, default=0, help="of the inputs")
    p.add_argument("--counters", action="store_true", help="slots, bytes and waits by warp role")
    p.add_argument("--trace", type=Path, metavar="FILE", help="write a trace for Perfetto")
    p.add_argument("--schedule", type=int, default=0, help="seed of all choices of order")
    p.add_argument(
        "--features",
        nargs="?",
        const="all",
        metavar="NAMES",
        help="instead of one question: every feature of our kernels, or those named (a,b,c)",
    )
    p.add_argument("--schedules", type=int, default=8, help="with --features: how many for each")
    return p


def case_of(options: argparse.Namespace) -> Case:
    """The question that the options ask.

    Raises:
        ValueError: head numbers that do not divide, or a negative size.
    """
    kv_heads = options.kv_heads or options.heads
    if min(options.batch, options.heads, kv_heads, options.seqlen_q, options.seqlen_k) < 1:
        raise ValueError("--batch, --heads, --kv-heads, --seqlen-q and --seqlen-k must be >= 1")
    if options.heads % kv_heads:
        raise ValueError(f"--heads {options.heads} is no multiple of --kv-heads {kv_heads}")
    left, right = (None if n < 0 else n for n in options.window or (-1, -1))
    return Case(
        dtype=DTYPES[options.dtype],
        batch=options.batch,
        heads=options.heads,
        kv_heads=kv_heads,
        seqlen_q=options.seqlen_q,
        seqlen_k=options.seqlen_k,
        head_dim=options.head_dim,
        head_dim_v=options.head_dim_v or options.head_dim,
        left=left,
        right=0 if options.causal else right,
        softcap=options.softcap,
        sink=options.sink,
        varlen=options.varlen,
        page_size=options.page_size,
        num_splits=options.num_splits,
        seed=options.seed,
    )


def run(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Exit status and report.

    Raises:
        NotImplementedError, ValueError: the kernels do not provide what the options ask for.
    """
    if options.features is not None:
        from . import sweep

        only = None if options.features == "all" else options.features
        ok, report = sweep.run(options.arch, options.schedules, only)
        return OK if ok else WRONG, report
    if options.kernel == "ours":
        from .ours import forward
    else:
        from .third_party import forward
    case = case_of(options)
    inputs = make_inputs(case)
    finding, verdict = None, Verdict(ok=False)
    trace = Trace() if options.trace else None
    strict: Literal["fences", False] = "fences" if options.kernel == "ours" else False
    with session(options.arch, options.schedule, strict=strict, trace=trace) as emulator:
        try:
            verdict = judge(case, inputs, *forward(emulator, case, inputs))
        except EmulationError as error:
            finding = str(error)
    report = {
        "ok": verdict.ok,
        "max_abs_err": finite(verdict.max_abs_err) if finding is None else None,
        "limit": verdict.limit if finding is None else None,
        "lse_err": finite(verdict.lse_err) if finding is None else None,
        "instructions": emulator.instructions,
        "seconds": round(emulator.seconds, 3),
        "schedule": options.schedule,
        "arch": emulator.card.arch,
        "kernel": options.kernel,
    }
    if finding is not None:
        report["finding"] = finding
    if options.counters:
        report |= count(emulator, case, inputs)
    if trace is not None:
        trace.write(options.trace)
        report["trace"] = str(options.trace)
    return OK if verdict.ok else WRONG, report


def count(emulator: Session, case: Case, inputs: Inputs) -> dict[str, Any]:
    """Print a table for each launch, per tile, and return all counters for JSON."""
    tiles = visible(case, inputs) / TILE
    for launch in emulator.runs:
        print(f"{launch.kernel}: per {TILE_NAME}, of which there are {tiles:.2f}")
        print(as_table(launch.roles, max(tiles, 1e-9)))
    launches = [{"kernel": x.kernel, "roles": as_dicts(x.roles)} for x in emulator.runs]
    return {"tiles": tiles, "counters": launches}


def finite(value: float) -> float | None:
    """`value`, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parser().parse_args(arguments)
    bootstrap()
    try:
        status, report = run(options)
    except (NotImplementedError, ValueError, ImportError) as error:
        print(f"emulate: {error}", file=sys.stderr)
        status, report = REFUSED, {"ok": False, "refused": str(error), "schedule": options.schedule}
    print(json.dumps(report))
    return status
