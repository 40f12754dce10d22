"""Decode speed: one query token against a cache, ours beside PyTorch's FA2 and cuDNN and upstream.

usage: python benchmarks/benchmark_decode.py [--peers [NAME ...]] [--splits N ...] [--quick]

bf16, the last cells with an e4m3 cache, random data. Each figure is the median of replays of a CUDA
graph that holds at least eight calls, on caches that together are larger than the L2, so that each
call reads its keys from memory as a model's layers do. The floor is the bytes of K and V at the
speed of a large elementwise kernel (bytes read and written) in the same run. The table comes last;
everything goes to benchmarks/results/.
"""

import argparse
import math
import runpy
import sys
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

if not __package__:  # run as a file: the same as python -m
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    runpy.run_module(f"benchmarks.{Path(__file__).stem}", run_name="__main__", alter_sys=True)
    sys.exit()


import torch

from .common import RESULTS, build_kernel, table, time_events, write_json
from .decode_peers import PEERS, DecodeProblem
from .peers import OURS, Server, start_servers
from .plot import bars

WRONG = 0.02  # more than bf16 noise between two exact kernels on normal inputs
COPY_BYTES = 1 << 30

# The cells that the project's bars are stated for, and pages where they matter.
DENSE = ((1, 8192), (1, 131072), (8, 8192), (64, 4096), (128, 8192))
PAGED = ((1, 8192), (8, 8192), (64, 4096))
FP8 = ((8, 8192), (64, 4096))
PAGE_SIZES = (16, 32, 64, 128)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", nargs="*", choices=PEERS, help="all if none is named")
    parser.add_argument(
        "--splits", nargs="*", type=int, default=[0], help="for ours; 0: the plan's"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--milliseconds", type=float, default=100.0, help="per round and kernel")
    parser.add_argument("--quick", action="store_true", help="dense cells only, one round")
    parser.add_argument("--output", type=Path, help="JSON file; default in benchmarks/results/")
    return parser.parse_args()


def problems(options: argparse.Namespace) -> list[DecodeProblem]:
    cells = [DecodeProblem(*cell) for cell in DENSE]
    if not options.quick:
        cells += [DecodeProblem(*cell, page_size=size) for cell in PAGED for size in PAGE_SIZES]
        cells += [DecodeProblem(*cell, fp8=True) for cell in FP8]
    return [replace(cell, num_splits=splits) for cell in cells for splits in options.splits]


def copy_terabytes() -> float:
    """Bytes read plus bytes written by a large elementwise kernel, in 10^12 a second.

    A copy would become a node of the graph that the slower copy engines carry out.
    """
    source = torch.zeros(COPY_BYTES // 4, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    torch.neg(source, out=target)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.neg(source, out=target)
    return 2 * COPY_BYTES / median(time_events(graph.replay, 100.0)) / 1e9


def measure(problem: DecodeProblem, servers: list[Server], rounds: int, milliseconds: float):
    """name -> {"median_us", "terabytes_per_s", ...} or {"error"}."""
    found: dict[str, dict[str, Any]] = {}
    for _ in range(rounds):
        for server in servers:
            entry = found.setdefault(server.name, {"samples": []})
            if "error" in entry:
                continue
            answer = server.measure(problem, milliseconds)
            if "error" in answer:
                found[server.name] = {"error": answer["error"]}
                continue
            entry["samples"] += answer["us"]
            entry["error_vs_fa2"] = answer["error_vs_fa2"]
    for entry in found.values():
        if "samples" in entry:
            samples = entry.pop("samples")
            entry["median_us"], entry["count"] = round(median(samples), 3), len(samples)
            entry["terabytes_per_s"] = round(problem.bytes / entry["median_us"] / 1e6, 3)
    return found


def print_table(rows: list[dict[str, Any]], names: list[str], ceiling: float) -> None:
    """Microseconds and TB/s of each, and ours over each peer."""
    peers = [name for name in names if name != OURS]
    header = ["us (TB/s)", "floor", *names, *(f"/{name}" for name in peers)]
    lines = []
    for row in rows:
        problem, found = DecodeProblem(**row["problem"]), row["measured"]
        line = [str(problem), f"{problem.bytes / ceiling / 1e6:.1f}"]
        for name in names:
            entry = found[name]
            wrong = entry.get("error_vs_fa2", 0.0) > WRONG
            figures = f"{entry.get('median_us', 0):.1f} ({entry.get('terabytes_per_s', 0):.2f})"
            line.append("-" if "error" in entry else f"{figures}{'!' * wrong}")
        for name in peers:
            both = "error" not in found[name] and "error" not in found[OURS]
            line.append(
                f"{found[name]['median_us'] / found[OURS]['median_us']:.2f}" if both else "-"
            )
        lines.append(line)
    print(f"copy ceiling: {ceiling:.2f} TB/s")
    print(table(header, lines))
    for name in names:
        errors = {row["measured"][name].get("error") for row in rows} - {None}
        for error in errors:
            print(f"{name} gave no answer to some: {error}")


def failed(rows: list[dict[str, Any]]) -> bool:
    """Whether ours gave no answer, or a wrong one, to any problem."""
    mine = [row["measured"][OURS] for row in rows]
    return any("error" in entry or entry["error_vs_fa2"] > WRONG for entry in mine)


def main() -> None:
    options = arguments()
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA GPU")
    peers = [] if options.peers is None else options.peers or list(PEERS)
    build_kernel()
    ceiling = copy_terabytes()
    torch.cuda.empty_cache()
    servers = start_servers([OURS, *peers], module="benchmarks.decode_peers")
    rows = []
    for problem in problems(options):
        rounds = 1 if options.quick else options.rounds
        found = measure(problem, servers, rounds, options.milliseconds)
        rows.append({"problem": asdict(problem), "bytes": problem.bytes, "measured": found})
        times = ", ".join(f"{n} {e.get('median_us', 'failed')}" for n, e in found.items())
        print(f"{problem}: {times}", flush=True)
    for server in servers:
        server.close()
    output = options.output or RESULTS / "decode.json"
    write_json(output, rows, copy_terabytes_per_s=ceiling)
    names = [server.name for server in servers]
    labels = [str(DecodeProblem(**row["problem"])) for row in rows]
    figures = {
        name: [row["measured"][name].get("terabytes_per_s", math.nan) for row in rows]
        for name in names
    }
    bars(output.with_suffix(".png"), labels, figures, "TB/s")
    print_table(rows, names, ceiling)
    raise SystemExit(failed(rows))


if __name__ == "__main__":
    main()
