"""What was measured on an H200, by benchmarks/benchmark_forward.py, as points of the model."""

import json
from pathlib import Path

from .calibrate import Point
from .grid import Problem
from .problems import ROOT, Kernel

RESULTS = ROOT / "benchmarks" / "results" / "2026-11-29-h200-forward-peers.json"
ARCH = "sm_90a"
# Column of the results -> who wrote the kernel.
KERNELS = {"ours": "ours", "upstream-sm90": "upstream", "upstream-sm120": "upstream-sm120"}
FITTED = (64, 128)
DIMENSIONS = (64, 96, 128, 256)  # that are recorded


def points(path: Path = RESULTS) -> list[Point]:
    """(kernel, problem, TFLOP/s, whether it is fitted).

    Held out are every other pair of shapes with d 64 or 128, and all others.
    """
    found = []
    shapes = [
        row for row in json.loads(path.read_text())["rows"]
        if row["problem"]["head_dim"] in DIMENSIONS
    ]  # fmt: skip
    for index, row in enumerate(shapes):
        asked = row["problem"]
        d, causal = asked["head_dim"], asked["causal"]
        sizes = (asked["batch"], asked["seqlen"], asked["heads"], asked["heads_kv"])
        problem = Problem(*sizes, d, d, causal)
        for column, who in KERNELS.items():
            kernel = Kernel(who, ARCH, d, d, causal)
            # Shapes come in pairs, dense and causal.
            found.append(
                (
                    kernel,
                    problem,
                    row["measured"][column]["tflops"],
                    d in FITTED and index // 2 % 2 == 0,
                )
            )
    return found
