"""Prefill speed: ours beside PyTorch's FA2 and cuDNN, upstream FlashAttention-4 and fastflash.

usage: python benchmarks/benchmark_forward.py [--peers [NAME ...]] [--ceiling TFLOPS] [--quick]

Random data, median of single launches timed by CUDA events with a cold L2, in rounds that visit
every implementation in turn, so that clocks and heat are the same for all. The answers are compared
with PyTorch's FA2 on the same data. The table comes last; everything goes to benchmarks/results/.
"""

import argparse
import math
import runpy
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

if not __package__:  # run as a file: the same as python -m
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    runpy.run_module(f"benchmarks.{Path(__file__).stem}", run_name="__main__", alter_sys=True)
    sys.exit()


import torch

from .common import RESULTS, Problem, build_kernel, prefill_grid, table, write_json
from .peers import OURS, PEERS, Server, prepare, start_servers
from .plot import bars

WRONG = 0.05  # more than bf16 noise between two exact kernels on normal inputs


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", nargs="*", choices=PEERS, help="all if none is named")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--milliseconds", type=float, default=100.0, help="per round and kernel")
    parser.add_argument("--quick", action="store_true", help="the first two shapes, one round")
    parser.add_argument(
        "--ceiling", type=float, help="measured mma.sync TFLOP/s of the card, for the last column"
    )
    parser.add_argument("--output", type=Path, help="JSON file; default in benchmarks/results/")
    return parser.parse_args()


def measure(problem: Problem, servers: list[Server], rounds: int, milliseconds: float):
    """name -> {"median_ms", "round_medians_ms", ...} or {"error"}."""
    found: dict[str, dict[str, Any]] = {}
    for _ in range(rounds):
        for server in servers:
            entry = found.setdefault(server.name, {"samples": [], "round_medians_ms": []})
            if "error" in entry:
                continue
            answer = server.measure(problem, milliseconds)
            if "error" in answer:
                found[server.name] = {"error": answer["error"]}
                continue
            entry["samples"] += answer["ms"]
            entry["round_medians_ms"].append(round(median(answer["ms"]), 5))
            entry["error_vs_fa2"] = answer["error_vs_fa2"]
    for entry in found.values():
        if "samples" in entry:
            samples = entry.pop("samples")
            entry["median_ms"], entry["count"] = round(median(samples), 5), len(samples)
            entry["tflops"] = round(problem.flops / entry["median_ms"] / 1e9, 1)
    return found


def make_row(problem: Problem, found: dict[str, dict[str, Any]], ceiling: float | None):
    """One row of the JSON: ratios are our speed over theirs."""
    mine = found.get(OURS, {}).get("tflops")
    ratios = {
        name: round(mine / entry["tflops"], 3)
        for name, entry in found.items()
        if name != OURS and mine and "tflops" in entry
    }
    row = {"problem": asdict(problem), "flops": problem.flops, "measured": found}
    row["speed_over"] = ratios
    if ceiling and mine:
        row["percent_of_ceiling"] = round(100 * mine / ceiling, 1)
    return row


def print_table(rows: list[dict[str, Any]], names: list[str]) -> None:
    """TFLOP/s of each, and ours over each peer."""
    peers = [name for name in names if name != OURS]
    ceiling = any("percent_of_ceiling" in row for row in rows)
    header = ["TFLOP/s", "GFLOP", *names, *(f"/{name}" for name in peers)]
    lines = []
    for row in rows:
        line = [str(Problem(**row["problem"])), f"{row['flops'] / 1e9:.0f}"]
        for name in names:
            entry = row["measured"][name]
            wrong = entry.get("error_vs_fa2", 0.0) > WRONG
            line.append("-" if "error" in entry else f"{entry['tflops']:.0f}{'!' * wrong}")
        line += [f"{row['speed_over'][n]:.2f}" if n in row["speed_over"] else "-" for n in peers]
        if ceiling:
            line.append(
                f"{row['percent_of_ceiling']:.0f} %" if "percent_of_ceiling" in row else "-"
            )
        lines.append(line)
    print(table([*header, "of ceiling"] if ceiling else header, lines))
    refusals = {
        (name, entry["error"]): str(Problem(**row["problem"]))
        for row in rows
        for name, entry in row["measured"].items()
        if "error" in entry
    }
    for (name, error), problem in refusals.items():
        print(f"{name} gave no answer, for example to {problem}: {error}")


def failed(rows: list[dict[str, Any]]) -> bool:
    """Whether ours gave no answer, or a wrong one, to any problem."""
    mine = [row["measured"].get(OURS, {"error": "not measured"}) for row in rows]
    return any("error" in entry or entry["error_vs_fa2"] > WRONG for entry in mine)


def main() -> None:
    options = arguments()
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA GPU")
    peers = [] if options.peers is None else options.peers or list(PEERS)
    build_kernel()
    servers = start_servers([OURS, *peers])
    problems = prefill_grid(options.dtype)
    rounds = options.rounds
    if options.quick:
        problems, rounds = problems[:4], 1
    prepare(servers, problems)
    rows = []
    for problem in problems:
        found = measure(problem, servers, rounds, options.milliseconds)
        rows.append(make_row(problem, found, options.ceiling))
        speeds = ", ".join(f"{n} {e.get('tflops', 'failed')}" for n, e in found.items())
        print(f"{problem}: {speeds}", flush=True)
    for server in servers:
        server.close()
    output = options.output or RESULTS / "forward.json"
    write_json(output, rows, ceiling_tflops=options.ceiling)
    names = [server.name for server in servers]
    labels = [str(problem) for problem in problems]
    figures = {
        name: [row["measured"][name].get("tflops", math.nan) for row in rows] for name in names
    }
    bars(output.with_suffix(".png"), labels, figures, "TFLOP/s")
    print_table(rows, names)
    raise SystemExit(failed(rows))


if __name__ == "__main__":
    main()
