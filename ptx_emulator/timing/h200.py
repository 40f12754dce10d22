"""What was measured on an H200, by benchmarks/benchmark_forward.py, as points of the model."""

import json
from pathlib import Path

from .calibrate import Point
from .grid import Problem
from .problems import ROOT, Kernel

RESULTS = ROOT / "benchmarks" / "results"
ARCH = "sm_90a"
NOW, PEERS = "2026-11-29-h200-forward-slots.json", "2026-11-29-h200-forward-peers.json"
# Who wrote the kernel -> its column, and the newest results that have it. Upstream's kernels have
# not changed in between. What both files have of others: PyTorch's FA2 0.99 to 1.03 times as fast
# in the newer one, upstream's sm_120 kernel 1.00 to 1.09 times.
KERNELS = {
    "ours": ("ours", NOW),
    "upstream": ("upstream-sm90", PEERS),
    "upstream-sm120": ("upstream-sm120", NOW),
}
FITTED = (64, 128)
DIMENSIONS = (64, 96, 128, 256)  # that are recorded


def points(folder: Path = RESULTS) -> list[Point]:
    """(kernel, problem, TFLOP/s, whether it is fitted).

    Held out are every other pair of shapes with d 64 or 128, and all others.
    """
    measured = {name: _rows(folder / name) for name in (NOW, PEERS)}
    found = []
    for index, (problem, row) in enumerate(measured[NOW].items()):
        d = problem.head_dim
        for who, (column, name) in KERNELS.items():
            tflops = (row if name == NOW else measured[name][problem])[column]["tflops"]
            kernel = Kernel(who, ARCH, d, d, problem.causal)
            # Shapes come in pairs, dense and causal.
            found.append((kernel, problem, tflops, d in FITTED and index // 2 % 2 == 0))
    return found


def _rows(path: Path) -> dict[Problem, dict]:
    """What was measured of each problem, by column."""
    found = {}
    for row in json.loads(path.read_text())["rows"]:
        asked = row["problem"]
        d = asked["head_dim"]
        if d in DIMENSIONS:
            sizes = (asked["batch"], asked["seqlen"], asked["heads"], asked["heads_kv"])
            found[Problem(*sizes, d, d, asked["causal"])] = row["measured"]
    return found
