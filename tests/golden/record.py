"""`python -m tests.golden.record FOLDER`: run everything on CUDA device 0 (compute capability 9.0)
and keep what came out.

Programs need the driver alone; the whole kernels need PyTorch, CuTe DSL and upstream. Both run at
the same time, in processes that are replaced when a kernel has spoilt their context. Writes
FOLDER/programs.xz, FOLDER/kernels.xz and FOLDER/report.json (the card, and errors by name).

With --missing it runs only what data/ has no result of. `--merge FOLDER` takes what another call
has written to FOLDER over into data/, and needs no card.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from . import store
from .card import Card, CudaError

DATA = Path(__file__).parent / "data"
SPOILT = 3  # exit status: go on in another process
ONE_PROGRAM, ONE_KERNEL = 15.0, 100.0  # seconds until it counts as hanging


class Worker:
    """Runs the members of a group that no part before has tried, and writes a part."""

    def __init__(self, folder: Path, group: str, number: int) -> None:
        self.stem = folder / "parts" / f"{group}-{number}"
        self.results: dict[str, np.ndarray] = {}
        self.report: dict[str, Any] = {"tried": [], "errors": {}, "card": {}}
        self.before: set[str] = set()
        self.saved = time.monotonic()
        for part in folder.glob(f"parts/{group}-*.json"):
            self.before |= set(json.loads(part.read_text())["tried"])
        # also what killed a process before it could write its part
        self.before |= {part.read_text() for part in folder.glob(f"parts/{group}-*.now")}

    def save(self) -> None:
        np.savez_compressed(self.stem.with_suffix(".npz"), **self.results)
        self.stem.with_suffix(".json").write_text(json.dumps(self.report))
        self.saved = time.monotonic()

    def give_up(self, name: str, reason: str) -> None:
        """Save what there is and end the process, whatever the device does."""
        self.report["errors"][name] = reason
        self.save()
        os._exit(SPOILT)

    def run(self, names: list[str], one: Any, limit: float, alive: Any) -> None:
        for name in names:
            if name in self.before:
                continue
            self.report["tried"].append(name)
            self.stem.with_suffix(".now").write_text(name)
            watch = threading.Timer(limit, self.give_up, (name, f"ran for {limit} s"))
            watch.start()
            try:
                for key, array in one(name).items():
                    self.results[f"{name}/{key}"] = array
            except BaseException as error:
                self.report["errors"][name] = f"{type(error).__name__}: {error}"
                if not isinstance(error, CudaError):
                    traceback.print_exc()
                try:
                    alive()
                except BaseException:
                    self.give_up(name, self.report["errors"][name])
            finally:
                watch.cancel()
            if time.monotonic() - self.saved > 2:
                self.save()
        self.save()


def run_programs(worker: Worker, known: set[str]) -> None:
    from . import all_programs

    card = Card()
    worker.report["card"] = {"name": card.name, "driver": card.driver_version}
    programs = all_programs()

    def one(name: str) -> dict[str, np.ndarray]:
        program = programs[name]
        words, map_ = card.run(program)
        found = {"target": words, "source": digest(program.source)}
        if program.map is not None:
            found["map"] = np.frombuffer(map_[8:64], np.uint8)
        return found

    names = [name for name in programs if name not in known]
    worker.run(names, one, ONE_PROGRAM, lambda: card.check("cuCtxSynchronize"))


def run_kernels(worker: Worker, known: set[str]) -> None:
    import torch

    from . import kernels

    worker.report["card"] = {"torch": torch.__version__}

    def one(name: str) -> dict[str, np.ndarray]:
        started = time.perf_counter()
        found = kernels.on_card(kernels.CASES[name])
        worker.report["card"][f"seconds of {name}"] = round(time.perf_counter() - started, 1)
        return found

    names = [name for name in kernels.CASES if name not in known]
    worker.run(names, one, ONE_KERNEL, torch.cuda.synchronize)


def digest(words: np.ndarray) -> np.ndarray:
    """Eight bytes that tell whether a program's input is still the same."""
    return np.frombuffer(hashlib.sha1(words.tobytes()).digest()[:8], np.uint8)


GROUPS = {"programs": run_programs, "kernels": run_kernels}


def drive(folder: Path, group: str, missing: bool, deadline: float) -> None:
    """Start workers of a group until one comes to its end."""
    for number in range(20):
        command = [sys.executable, "-m", "tests.golden.record", str(folder)]
        command += ["--group", group, "--part", str(number), *["--missing"] * missing]
        left = max(1.0, deadline - time.monotonic())
        try:
            status = subprocess.run(command, timeout=left).returncode
        except subprocess.TimeoutExpired:
            print(f"{group}: out of time", flush=True)
            return
        print(f"{group}: part {number} ended with {status}", flush=True)
        if status not in (SPOILT, *range(-64, 0)):
            return


def known_names(group: str) -> set[str]:
    """What data/ has a result of."""
    file = DATA / f"{group}.xz"
    return {name.rpartition("/")[0] for name in store.load(file)} if file.exists() else set()


def adopt(folder: Path) -> None:
    """Add the results in a folder to data/."""
    from . import all_programs, kernels

    new, report = (json.loads((f / "report.json").read_text()) for f in (folder, DATA))
    known = set()
    for group in GROUPS:
        results = store.load(DATA / f"{group}.xz") | store.load(folder / f"{group}.xz")
        store.save(DATA / f"{group}.xz", results)
        known |= known_names(group)
        report[group] = len(known_names(group))
    wanted = {*all_programs(), *kernels.CASES} - known
    errors = report["errors"] | new["errors"]
    report["errors"] = {name: why for name, why in errors.items() if name in wanted}
    (DATA / "report.json").write_text(json.dumps(report, indent=1) + "\n")


def merge(folder: Path) -> dict[str, Any]:
    """One file a group, and one report."""
    report: dict[str, Any] = {"card": {}, "errors": {}}
    for group in GROUPS:
        results: dict[str, np.ndarray] = {}
        for last in folder.glob(f"parts/{group}-*.now"):
            if not last.with_suffix(".json").exists():
                report["errors"][last.read_text()] = "the process died"
        for part in sorted(folder.glob(f"parts/{group}-*.json")):
            found = json.loads(part.read_text())
            report["card"] |= found["card"]
            report["errors"] |= found["errors"]
            with np.load(part.with_suffix(".npz")) as arrays:
                results |= {name: arrays[name] for name in arrays.files}
        store.save(folder / f"{group}.xz", results)
        report[group] = len({name.rpartition("/")[0] for name in results})
        if not list(folder.glob(f"parts/{group}-*.json")):
            report["errors"][group] = "nothing was tried: see what the worker printed"
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden.record", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--group", choices=GROUPS, help=argparse.SUPPRESS)
    parser.add_argument("--part", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--missing", action="store_true", help="only what data/ has no result of")
    parser.add_argument("--merge", action="store_true", help="add what FOLDER holds to data/")
    parser.add_argument("--seconds", type=float, default=150, help="stop after this time")
    options = parser.parse_args()
    if options.merge:
        adopt(options.folder)
        return 0
    (options.folder / "parts").mkdir(parents=True, exist_ok=True)
    if options.group:
        worker = Worker(options.folder, options.group, options.part)
        known = known_names(options.group) if options.missing else set()
        GROUPS[options.group](worker, known)
        return 0
    for stale in options.folder.glob("parts/*"):
        stale.unlink()
    started = time.monotonic()
    threads = [
        threading.Thread(
            target=drive, args=(options.folder, group, options.missing, started + options.seconds)
        )
        for group in GROUPS
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report = merge(options.folder)
    print(json.dumps(report, indent=1))
    print(f"{time.monotonic() - started:.0f} s")
    return int(bool(report["errors"]))


if __name__ == "__main__":
    sys.exit(main())
