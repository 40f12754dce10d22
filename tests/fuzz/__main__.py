"""A randomised search for wrong answers over the whole argument space of the public functions.

    make fuzz ARGS="--backend emulator --arch sm120a --cases 300 --seed 7"

Every case is a call with a defined answer, drawn from a seed and judged by the float64 oracle:
layouts, lengths, heads, head dimensions, dtypes, masks, softcap, sinks, ALiBi, scales, splits,
strides, fills, NaN in whatever must not be read, dropout, appending to a cache, merging partial
results. What fails is
shrunk to a minimal case; --replay runs one again. Calls that the back end refuses
(NotImplementedError) are counted as refused, never as passed. The last line sums up; the status is
0 if some cases passed and nothing was found.
"""

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOGS = ROOT / ".cache" / "fuzz"
RESULT = "RESULT "


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--backend", choices=("cpu", "emulator", "cuda"), default="cpu")
    parser.add_argument("--arch", default="sm120a", help="emulator: sm90a, sm100a, sm103a, ...")
    parser.add_argument("--cases", type=int, default=300, help="cases to run, over all shards")
    parser.add_argument("--seed", type=int, default=0, help="the same seed, the same cases")
    parser.add_argument("--kernels", type=int, default=12, help="kernels to draw, for each shard")
    parser.add_argument("--shards", type=int, default=1, help="processes side by side")
    parser.add_argument("--seconds", type=float, default=86400, help="start no case after this")
    parser.add_argument("--replay", metavar="CASE", help="run this one, as a finding prints it")
    parser.add_argument("--shard", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


# --- one process ----------------------------------------------------------------------------------


def search(options: argparse.Namespace) -> None:
    """Run one shard and print its tally for the parent."""
    from .backends import open_backend
    from .generate import draw_pool
    from .search import DeviceLost, Search

    backend = open_backend(options.backend, options.arch)
    seed = options.seed * 100 + options.shard
    share = -(-options.cases // options.shards)
    found = Search(backend, draw_pool(seed, options.kernels), LOGS / f"shard{options.shard}.txt")
    try:
        found.run(share, seed, options.seconds)
    except DeviceLost as error:
        case = found.log.read_text()
        found.tally.findings.append({"case": case, "error": str(error), "seed": str(seed)})
    print(RESULT + json.dumps(found.tally.as_dict()), flush=True)


def replay(options: argparse.Namespace) -> int:
    """Run one case and let its error through."""
    import torch

    from ..append_cases import Append
    from ..cases import Case
    from ..oracle import Rule
    from .backends import open_backend
    from .merges import Merge
    from .verdict import verify

    names = {"torch": torch, "Case": Case, "Append": Append, "Merge": Merge, "Rule": Rule}
    value = eval(options.replay, names)  # the user's own command line
    backend = open_backend(options.backend, options.arch)
    with backend.running(value):
        verify(backend.package, value, backend.device, backend.twice)
    print("fuzz: ok replayed 1 case")
    return 0


# --- all of them ----------------------------------------------------------------------------------


def start(options: argparse.Namespace, shard: int) -> subprocess.Popen:
    names = ("backend", "arch", "cases", "seed", "kernels", "shards", "seconds")
    given = [f"--{name}={getattr(options, name)}" for name in names]
    command = [sys.executable, "-m", "tests.fuzz", *given, f"--shard={shard}"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def collect(process: subprocess.Popen, shard: int) -> dict:
    """The tally of a shard; one that died is a finding of the case that it died in."""
    output, _ = process.communicate()
    results = [line for line in output.splitlines() if line.startswith(RESULT)]
    if process.returncode == 0 and results:
        return json.loads(results[-1].removeprefix(RESULT))
    log = LOGS / f"shard{shard}.txt"
    case = log.read_text() if log.exists() else "none yet"
    error = f"the process ended with status {process.returncode} (it hung, or crashed)\n{output}"
    finding = {"case": case, "error": error, "seed": "?"}
    return {"passed": 0, "refused": {}, "findings": [finding], "kernels": 0}


def report(options: argparse.Namespace, tallies: list[dict], seconds: float) -> int:
    refused: Counter = Counter()
    for tally in tallies:
        refused.update(tally["refused"])
    findings = [finding for tally in tallies for finding in tally["findings"]]
    for number, finding in enumerate(findings, 1):
        print(
            f"--- finding {number}, seed {finding['seed']}\n{finding['error']}\n{finding['case']}"
        )
    for argument, count in refused.most_common():
        print(f"refused {count:5d}  {argument}")
    passed = sum(tally["passed"] for tally in tallies)
    ok = passed > 0 and not findings
    where = options.arch if options.backend == "emulator" else options.backend
    print(
        f"fuzz: {'ok' if ok else 'FAILED'} on={where} "
        f"cases={passed + sum(refused.values()) + len(findings)} passed={passed} "
        f"refused={sum(refused.values())} findings={len(findings)} "
        f"kernels={sum(tally['kernels'] for tally in tallies)} seed={options.seed} "
        f"shards={options.shards} seconds={seconds:.0f}"
    )
    return 0 if ok else 1


def main() -> int:
    options = parse()
    if options.shard is not None:
        search(options)
        return 0
    subprocess.run([sys.executable, "-m", "flash_attn4_cute.build"], cwd=ROOT, check=True)
    if options.replay:
        return replay(options)
    LOGS.mkdir(parents=True, exist_ok=True)
    for log in LOGS.glob("shard*.txt"):
        log.unlink()
    began = time.monotonic()
    processes = [start(options, shard) for shard in range(options.shards)]
    tallies = [collect(process, shard) for shard, process in enumerate(processes)]
    return report(options, tallies, time.monotonic() - began)


if __name__ == "__main__":
    sys.exit(main())
