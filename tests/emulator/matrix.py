"""The tcgen05 kernel's acceptance matrix: a core under 16 schedules, a wide set under 2.

usage: python -m tests.emulator.matrix --arch sm100a [sm103a] [--only TEXT] [--set core|wide]
                                       [--jobs N] [--seconds S] [--shard I/N]

Every entry is a call as users make it, run on an emulated card and judged against float64. Prints a
line for each, or for some of its schedules, and one of JSON at the end; the status is 1 if any is
wrong or has a finding. Processes that are started apart (--shard) must not build at the same time:
they take the package that $FLASH_ATTN_4_PACKAGE names. CI carries the core under one schedule each
(test_ours_sm100_matrix.py).
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from itertools import count, product
from multiprocessing import get_context
from types import ModuleType
from typing import Any

import ptx_emulator

if __name__ == "__main__":
    ptx_emulator.bootstrap()

import torch

from ptx_emulator.findings import EmulationError
from tests import harness
from tests.cases import BF16, F16, MASKS, WINDOW_ENCODINGS, Case
from tests.conftest import GIVEN, REPO_ID, ROOT
from tests.inputs import FILLS, PLACEMENTS
from tests.oracle import Rule
from tests.test_block_sparse import check as check_lists
from tests.test_block_sparse import kinds_of
from tests.test_mods import MODS, documents, from_table

from .on_cards import card

CORE_SCHEDULES, WIDE_SCHEDULES = 16, 2
AT_ONCE = 4  # schedules of an entry that a process takes with one compiled kernel
CPU = torch.device("cpu")
# (d, d_v) of each row of the table, with the slots of its ring of K and V
ROWS = {(64, 64): 8, (96, 96): 6, (128, 128): 4, (192, 128): 2, (256, 256): 4}
# The kernel for many rows, also where there are few: nothing is packed.
APART = {"heads": 1, "heads_kv": 1, "pack_gqa": False}
GROUPED = {"heads": 2, "heads_kv": 1}
TWO = {"seqlens_q": (140, 140), "seqlens_k": (150, 150), **GROUPED}
UNEVEN = {"layout": "varlen", "seqlens_q": (60, 0, 280), "seqlens_k": (130, 5, 70), **GROUPED}
# The merge of split keys takes the emulator longer than all else: few rows there.
FEW = {"seqlens_q": (70, 0, 9), "seqlens_k": (290, 20, 129), "causal": True, **GROUPED}
PAGES = FEW | {"layout": "paged"}
HOLES = {"layout": "varlen", "seqlens_q": (0, 70, 0, 0, 270, 1), "seqlens_k": (9, 0, 0, 70, 200, 3)}
USED = {
    "seqlens_q": (140,) * 6, "seqlens_k": (300,) * 6, "layout": "dense",
    "used_q": (140, 0, 33, 140, 1, 129), "used_k": (101, 300, 0, 256, 1, 299),
}  # fmt: skip

CORE: dict[str, dict] = {
    "full": {"d": 128, **TWO, "pack_gqa": False},
    "causal": {"d": 64, "causal": True, **TWO},
    "band": {"d": 96, "window": (70, 30), **TWO},
    "left": {"d": 192, "d_v": 128, "window": (40, None), **TWO},
    "pair": {"d": 256, "causal": True, **TWO},
    "narrow_pair": {"d": 136, "d_v": 40, **TWO},
    "holes": {"d": 128, "causal": True, **HOLES, **APART},
    "used": {"d": 64, "causal": True, **USED, **APART},
    "used_pair": {"d": 256, "causal": True, "sink": True, **USED, **APART},
    "softcap": {"softcap": 0.5, "fill": "peaked", "causal": True, **TWO},
    "negative_scale": {"softmax_scale": -0.1, "window": (70, 30), **TWO},
    "all_steps": {"softcap": 15.0, "sink": True, "alibi": "head", "d_v": 32, **UNEVEN},
    "whole_tile": {**TWO, "heads": 8, "heads_kv": 2, "causal": True},
    "idle_rows": {**TWO, "heads": 3, "pack_gqa": True, "window": (40, 10)},
    "head_by_head": {**UNEVEN, "heads": 7, "sink": True, "alibi": "batch"},
    "dropout": {**UNEVEN, "heads": 4, "heads_kv": 2, "dropout_p": 0.2, "causal": True},
    "page_of_16": {**PAGES, "page_size": 16, "heads": 4, "heads_kv": 2},
    "page_of_2_blocks": {**PAGES, "page_size": 256, "strides": "interleaved_kv", "d": 128},
    "page_of_1.5_blocks": {**PAGES, "page_size": 192, "d": 128, "d_v": 96, "num_splits": 2},
    "page_of_1": {**PAGES, "page_size": 1, "strides": "interleaved_kv", "sink": True},
    "page_of_3": {**PAGES, "page_size": 3, "heads": 4, "d": 128},
    "page_of_100": {**PAGES, "page_size": 100, "num_splits": 3, "dropout_p": 0.1, "d": 72},
    "pages_of_a_pair": {**PAGES, "page_size": 64, "d": 256},
    "gathered_pair": {**PAGES, "page_size": 5, "d": 200, "d_v": 144},
    "split": {"num_splits": 3, "seqlens_q": (80,), "seqlens_k": (500,), "sink": True, **GROUPED},
    "more_splits_than_blocks": {**FEW, "layout": "varlen", "num_splits": 7, "d": 96},
}

Run = Callable[[ModuleType, str, int], None]


def case(name: str, turn: int = 0, **options: Any) -> Case:
    return Case(name=name, **{"d": 64, "dtype": (BF16, F16)[turn % 2], **options})


def attend(question: Case) -> Run:
    """A call of a public function, judged against the oracle."""

    def run(fa4: ModuleType, arch: str, schedule: int) -> None:
        call = harness.build(question, CPU)
        with card(fa4, arch, schedule) as emulator:
            answer = harness.run(fa4, call)
        assert emulator.runs or not (call.q.numel() and call.k.numel()), "no kernel was launched"
        harness.judge(call, answer)

    return run


def attend_lists(size: tuple[int, int], mask_mod: Any, options: dict) -> Run:
    """A call with a block-sparse mask of random lists."""
    lengths = {"seqlens_q": (290,), "seqlens_k": (410,), **GROUPED}
    question, splits = case("lists", **lengths | options), options.get("num_splits", 0)

    def run(fa4: ModuleType, arch: str, schedule: int) -> None:
        torch.manual_seed(0)
        kinds = kinds_of(question, size, per_head=mask_mod is not None)
        with card(fa4, arch, schedule):
            check_lists(fa4, question, kinds, size, mask_mod, CPU, num_splits=splits)

    return run


def attend_mods(rule: Rule, layout: str) -> Run:
    """A call with a user's functions."""
    question = case("mods", layout=layout, seqlens_q=(70, 70), seqlens_k=(90, 90), heads=4)

    def run(fa4: ModuleType, arch: str, schedule: int) -> None:
        torch.manual_seed(0)
        call = harness.build(question, CPU)
        table = [torch.randn(4, 90)] if rule.score_mod is from_table else None
        call.rule = Rule(**{**vars(rule), "aux_tensors": table})
        names = ("score_mod", "mask_mod", "causal", "softcap", "softmax_scale", "aux_tensors")
        named = {name: getattr(call.rule, name) for name in names}
        with card(fa4, arch, schedule):
            answer = harness.run(fa4, call, window_size=rule.window, **named)
        harness.judge(call, answer)

    return run


def core() -> dict[str, Run]:
    """Each thing that the kernel does, once."""
    entries = {name: attend(case(name, i, **given)) for i, (name, given) in enumerate(CORE.items())}
    entries["lists"] = attend_lists((128, 128), None, {})
    entries["lists_of_small_blocks"] = attend_lists((64, 32), documents, {"causal": True})
    entries["score_mod"] = attend_mods(MODS["from_table"], "dense")
    entries["mask_mod"] = attend_mods(MODS["odd_heads"], "varlen")
    return entries


def _lengths() -> Iterator[tuple[str, dict]]:
    """The rings turn 1 .. 2 stages + 1 times; rows and keys around the edges of tiles."""
    for (d, d_v), stages in ROWS.items():
        for blocks in range(1, 2 * stages + 2):
            keys = {"seqlens_q": (150,), "seqlens_k": (128 * blocks - 1,)}
            yield f"d{d}_{blocks}_blocks", {"d": d, "d_v": d_v, **keys, **APART}
    for d, causal, rows in product((64, 256), (False, True), (1, 2, 127, 128, 129, 255, 257, 385)):
        rows_and_keys = {"seqlens_q": (rows,), "seqlens_k": (140,), "causal": causal}
        yield f"d{d}_{rows}_rows{'_causal' * causal}", {"d": d, **rows_and_keys, **APART}
    for d, causal in product((64, 128, 192, 256), (False, True)):
        yield f"d{d}_holes{'_causal' * causal}", {"d": d, "causal": causal, **HOLES, **GROUPED}


LAYOUTS: dict[str, dict] = {
    "dense": TWO,
    "varlen": UNEVEN,
    "used": USED | GROUPED,
    "packed_q": UNEVEN | {"layout": "packed_q", "seqlens_k": (150,) * 3},
    "packed_k": UNEVEN | {"layout": "packed_k", "seqlens_q": (140,) * 3},
    "paged": PAGES | {"page_size": 16},
    "paged_dense": PAGES | {"layout": "paged_dense", "page_size": 128, "seqlens_q": (70,) * 3},
    "gathered": PAGES | {"page_size": 7},
    "split": FEW | {"layout": "varlen", "num_splits": 2},
}  # fmt: skip
DIMS = ((64, 64), (128, 128), (96, 96), (192, 128), (256, 256), (40, 24), (88, 104), (136, 200))


def _grid() -> Iterator[tuple[str, dict]]:
    """Masks by layouts; widths take turns, two at each place."""
    turn = count()
    for (layout, given), (mask, band), _ in product(LAYOUTS.items(), MASKS.items(), range(2)):
        # 9 is prime to the number of widths: neither mask nor layout always meets the same.
        number = next(turn)
        d, d_v = DIMS[number * 9 // 8 % len(DIMS)]
        yield (
            f"{layout}_{mask}_d{d}_{number}",
            {"causal": False} | given | band | {"d": d, "d_v": d_v},
        )
    for window, causal in product(WINDOW_ENCODINGS[::2], (False, True)):
        lengths = {"seqlens_q": (150,), "seqlens_k": (201,), **APART}
        yield (
            f"window_{window}{'_causal' * causal}",
            {"window": window, "causal": causal, **lengths},
        )


STEPS: dict[str, dict] = {
    "softcap": {"softcap": 20.0}, "sink": {"sink": True}, "alibi": {"alibi": "batch"},
    "zero_scale": {"softmax_scale": 0.0}, "negative_scale": {"softmax_scale": -0.2},
    "dropout": {"dropout_p": 0.3},
    "together": {"softcap": 9.0, "sink": True, "alibi": "head", "softmax_scale": 0.2},
}  # fmt: skip


def _features() -> Iterator[tuple[str, dict]]:
    """Steps by layouts, ratios of heads, splits, what numbers look like and where they lie."""
    for (step, given), layout in product(STEPS.items(), ("varlen", "paged", "split")):
        yield f"{step}_{layout}", LAYOUTS[layout] | given | {"causal": True}
    for ratio, rows in product((2, 3, 5, 6, 7, 10, 12, 16), (45, 129)):
        lengths = {"seqlens_q": (rows,), "seqlens_k": (140,), "causal": True, "pack_gqa": True}
        yield f"ratio_{ratio}_{rows}_rows", {"heads": ratio, "heads_kv": 1, **lengths}
    for ratio in (64, 96):
        lengths = {"seqlens_q": (5,), "seqlens_k": (140,), "pack_gqa": True}
        yield f"ratio_{ratio}", {"heads": ratio, "heads_kv": 1, **lengths}
    for splits, layout in product((3, 5, 33), ("varlen", "paged", "paged_dense")):
        yield f"{splits}_splits_{layout}", LAYOUTS[layout] | FEW_KEYS | {"num_splits": splits}
    for fill in FILLS:
        yield f"fill_{fill}", {"fill": fill, "d": 128, "causal": True, **TWO}
    for strides in PLACEMENTS:
        dense = {"seqlens_q": (150, 150), "seqlens_k": (150, 150), "heads": 4, "heads_kv": 2}
        yield f"strides_{strides}", {"strides": strides, "d": 64, "causal": True, **dense}


FEW_KEYS = {"seqlens_q": (70, 70), "seqlens_k": (290, 290), "causal": True}


def wide() -> dict[str, Run]:
    """Combinations, and everything around the edges."""
    entries: dict[str, Run] = {}
    for i, (name, given) in enumerate((*_lengths(), *_grid(), *_features())):
        assert name not in entries, f"two entries are called {name}"
        entries[name] = attend(case(name, i, **given))
    for size, mask in product(((128, 128), (64, 32), (16, 8), (48, 200)), ("full", "causal")):
        entries[f"lists_{size}_{mask}"] = attend_lists(size, None, MASKS[mask])
    entries["lists_documents"] = attend_lists((48, 200), documents, {"window": (90, 40), "d": 128})
    entries["lists_split"] = attend_lists((64, 32), None, {"num_splits": 3, "seqlens_q": (70,)})
    for i, (name, rule) in enumerate(MODS.items()):
        entries[f"mod_{name}"] = attend_mods(rule, ("dense", "varlen")[i % 2])
    return entries


def load() -> ModuleType:
    """The kernel, as users load it, from the present sources unless a package is given."""
    from kernels import get_kernel

    if not GIVEN:
        subprocess.run([sys.executable, "-m", "flash_attn4_cute.build"], cwd=ROOT, check=True)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["FLASH_ATTN_4_CACHE"] = "0"  # of machine code, whose PTX nobody has
    return get_kernel(REPO_ID, version=1)


@dataclass(frozen=True)
class Task:
    """Some schedules of an entry of `sets()`, on one card."""

    arch: str
    kind: str
    name: str
    schedules: range

    def __str__(self) -> str:
        first, last = self.schedules[0], self.schedules[-1]
        return f"{self.kind}/{self.name} on {self.arch}, schedules {first} .. {last}"


@cache
def sets() -> dict[str, dict[str, Run]]:
    return {"core": core(), "wide": wide()}


def tasks(archs: list[str], only: str) -> Iterator[Task]:
    """What there is to do, the core first: its tasks take longest."""
    for kind, schedules in (("core", CORE_SCHEDULES), ("wide", WIDE_SCHEDULES)):
        for name, arch in product(sets()[kind], archs):
            if only in f"{kind}/{name}":
                for first in range(0, schedules, AT_ONCE):
                    yield Task(arch, kind, name, range(first, min(first + AT_ONCE, schedules)))


_loaded: list[ModuleType] = []  # once, before processes part


def run_task(task: Task) -> tuple[str, float]:
    """What is wrong with a task, or "", and the CPU seconds that it took."""
    fa4, start, wrong = _loaded[0], time.process_time(), ""
    for schedule in task.schedules:
        try:
            sets()[task.kind][task.name](fa4, task.arch.replace("sm", "sm_"), schedule)
        except (AssertionError, EmulationError) as error:
            wrong = f"schedule {schedule}: {type(error).__name__}: {error}"
            break
    # Compiled kernels of hundreds of entries would not fit the memory.
    importlib.import_module(f"{fa4.__name__}.flash_attn4_cute.compiler").compiled.cache_clear()
    return wrong, time.process_time() - start


def run_all(
    wanted: list[Task], jobs: int, seconds: float | None
) -> Iterator[tuple[Task, str, float]]:
    """Tasks with what `run_task` says; those that nobody has begun when time is up are left out."""
    torch.set_num_threads(1)  # a forked process does not have its parent's threads
    futures: dict[Future[tuple[str, float]], Task] = {}
    with ProcessPoolExecutor(jobs, get_context("fork")) as pool:
        for task in wanted:
            futures[pool.submit(run_task, task)] = task
        try:
            for future in as_completed(futures, seconds):
                yield futures.pop(future), *future.result()
        except TimeoutError:
            pass
        finally:
            pool.shutdown(cancel_futures=True)  # those who have begun end
    yield from ((task, *f.result()) for f, task in futures.items() if not f.cancelled())


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--arch", nargs="+", default=["sm100a"], choices=("sm100a", "sm103a"))
    p.add_argument("--only", default="", help="entries with this text in their name")
    p.add_argument("--set", choices=("core", "wide"), help="default: both")
    p.add_argument("--jobs", type=int, default=1, help="processes")
    p.add_argument("--seconds", type=float, help="begin with nothing else after so long")
    p.add_argument("--shard", default="1/1", help="I/N: every N-th task, from the I-th on")
    return p


def main() -> int:
    options = parser().parse_args()
    first, step = map(int, options.shard.split("/"))
    wanted = [t for t in tasks(options.arch, options.only) if options.set in (None, t.kind)]
    wanted, start = wanted[first - 1 :: step], time.time()
    _loaded.append(load())
    done: set[Task] = set()
    wrong, used = [], 0.0
    for task, fault, seconds in run_all(wanted, options.jobs, options.seconds):
        print(f"{'WRONG' if fault else 'ok'} {task} ({seconds:.0f} s)", fault, flush=True)
        done.add(task)
        wrong += [str(task)] * bool(fault)
        used += seconds
    report = {
        "runs": sum(len(task.schedules) for task in done),
        "entries": len({(task.arch, task.kind, task.name) for task in done}),
        "wrong": wrong,
        "not_run": [str(task) for task in wanted if task not in done],
        "seconds": round(time.time() - start),
        "cpu_seconds": round(used),
    }
    print(json.dumps(report))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
