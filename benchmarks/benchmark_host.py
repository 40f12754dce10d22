"""What a call costs before any kernel runs: host time to issue it, and the first call of a process.

usage: python benchmarks/benchmark_host.py [--device cuda] [--peers]

Host time: a small problem issued many times without waiting for the device, after a warm-up, in
several processes of each implementation; in each process several times, in turn with the others, so
that a host's better and worse moments meet all of them. The best of all is what the path takes,
since everything else on the host only adds; the median is what one meets. The yardstick, PyTorch's
zero_ of one element beside each measurement, tells a slow host or moment from a slow path. First
call: a fresh process each time, split into importing, loading the kernel, a shape's first call and
its second.
"""

import argparse
import json
import runpy
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

if not __package__:  # run as a file: the same as python -m
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    runpy.run_module(f"benchmarks.{Path(__file__).stem}", run_name="__main__", alter_sys=True)
    sys.exit()


from .common import RESULTS, ROOT, Problem, build_kernel, table, write_json
from .peers import OURS, Server, start_servers

SMALL = {
    "dense": Problem(1, 128, 32, 8, 128, causal=True),
    "dense decode": Problem(8, 1, 32, 8, 128, causal=True),
}

HOST_PEERS = ("torch-fa2", "upstream-sm90")

FRESH = """
import contextlib, json, time
clock = time.perf_counter
start = clock(); import torch; import kernels
with contextlib.suppress(ImportError):
    import tvm_ffi  # by get_kernel where it is there, and it builds an extension of its own
imported = clock()
if {device!r} == "cuda":
    torch.zeros(1, device="cuda")
ready = clock()
from benchmarks.common import Problem, load_kernel
kernel = load_kernel(); loaded = clock()
q, k, v = Problem(1, 1024, 32, 8, 128, causal=True).tensors({device!r})
sync = torch.cuda.synchronize if {device!r} == "cuda" else lambda: None
def call():
    sync(); start = clock(); kernel.flash_attn_func(q, k, v, causal=True); sync()
    return clock() - start
print(json.dumps(dict(import_s=imported - start, load_s=loaded - ready, first_call_s=call(),
                      second_call_s=call())))
"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--peers", action="store_true", help="PyTorch and upstream beside ours")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=7, help="in a round, of --count calls")
    parser.add_argument("--rounds", type=int, default=5, help="in a process, all in turn")
    parser.add_argument("--processes", type=int, default=3, help="for each figure")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def issue_times(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Microseconds of host time a call, for each small problem and implementation."""
    names = [OURS, *(HOST_PEERS if options.peers else ())]
    rows: list[dict[str, Any]] = [{"what": f"issue {n}", "microseconds": {}} for n in SMALL]
    for _ in range(options.processes):
        servers = start_servers(names, options.device)
        for row, problem in zip(rows, SMALL.values(), strict=True):
            for server, times in issue_in_turn(servers, problem, options).items():
                found = row["microseconds"].setdefault(server, {"processes": []})
                found["processes"].append({what: _spread(us) for what, us in times.items()})
        for server in servers:
            server.close()
    for row in rows:
        for times in row["microseconds"].values():
            for what in ("us", "yardstick_us"):
                found = [process[what] for process in times["processes"]]
                times[what] = {
                    "best": min(one["best"] for one in found),
                    "median": median(one["median"] for one in found),
                }
    return rows


def issue_in_turn(
    servers: list[Server], problem: Problem, options: argparse.Namespace
) -> dict[str, dict[str, list[float]]]:
    """Of each implementation, the figures of all rounds: {"us": [...], "yardstick_us": [...]}."""
    found: dict[str, dict[str, list[float]]] = {server.name: {} for server in servers}
    for _ in range(options.rounds):
        for server in servers:
            answer = server.issue(problem, options.count, options.repeats)
            if "error" in answer:
                raise SystemExit(f"{server.name}: {answer['error']}")
            for what, us in answer.items():
                found[server.name].setdefault(what, []).extend(us)
    return found


def _spread(times: list[float]) -> dict[str, float]:
    return {"best": round(min(times), 2), "median": round(median(times), 2)}


def first_call(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each stage in fresh processes: the median and all of them."""
    program = FRESH.replace("{device!r}", repr(options.device))
    runs = []
    for _ in range(options.processes):
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    medians = {stage: round(median([run[stage] for run in runs]), 5) for stage in runs[0]}
    return {"what": "fresh process", "seconds": medians, "runs": runs}


def main() -> None:
    options = arguments()
    build_kernel()
    issued, fresh = issue_times(options), first_call(options)
    output = options.output or RESULTS / f"host_{options.device}.json"
    write_json(output, [*issued, fresh], device=options.device)
    names = list(issued[0]["microseconds"])
    lines = []
    for row in issued:
        for what, label in (("us", row["what"]), ("yardstick_us", "  yardstick")):
            spreads = [row["microseconds"][name][what] for name in names]
            lines.append([label, *(f"{x['best']:.1f} / {x['median']:.1f}" for x in spreads)])
    print(table(["host time, us a call: best / median", *names], lines))
    for row in issued:
        medians = [process["us"]["median"] for process in row["microseconds"][OURS]["processes"]]
        print(f"{row['what']}, medians of ours by process:", *(f"{x:.1f}" for x in medians))
    print(table(["fresh process, s", *fresh["seconds"]],
                [["ours", *(f"{s:.4f}" for s in fresh["seconds"].values())]]))  # fmt: skip


if __name__ == "__main__":
    main()
