"""What each kind of warm call costs the host, and what parts of one cost by themselves.

usage: python benchmarks/benchmark_calls.py [--device cpu]

With --device cpu, tensors lie on the CPU and a driver that launches nothing takes the launches:
what is left is Python's share and PyTorch's allocations. Figures are the best of many short runs.
"""

import argparse
import ctypes
import importlib
import itertools
import runpy
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

if not __package__:  # run as a file: the same as python -m
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    runpy.run_module(f"benchmarks.{Path(__file__).stem}", run_name="__main__", alter_sys=True)
    sys.exit()

import torch

from .common import build_kernel, load_kernel, table, write_json

BATCH, HEADS, HEADS_KV, DIM, CAPACITY, PAGE = 8, 32, 8, 128, 1024, 16


@contextmanager
def no_driver(kernel: ModuleType) -> Iterator[None]:
    """While it lasts, calls on CPU tensors are planned for an H200 and launch nothing."""
    package = f"{kernel.__name__}.flash_attn4_cute"
    names = ("plan", "append_plan", "combine_plan", "device", "launcher.driver")
    *planners, device, drivers = (importlib.import_module(f"{package}.{n}") for n in names)
    execute = importlib.import_module(f"{kernel.__name__}.execute")
    nothing = ctypes.CDLL(None).pthread_equal  # 0, no error, for two pointers that differ

    class Library:
        cuLaunchKernelEx = cuMemsetD32Async = nothing

    class Nothing(drivers.Driver):
        def load(self, image: bytes) -> int:
            return 1

        def kernel(self, library: int, name: str) -> int:
            return 2

        def set_attribute(self, *arguments: Any) -> None:
            return None

    driver: Any = Nothing(Library())
    # As cheap as what PyTorch has for a card.
    driver.stream, driver.current_device = {0: 0}.__getitem__, itertools.repeat(0).__next__
    driver.empty = torch._C._dynamo.guards._empty_strided_cpu
    card = device.Card("no card", (9, 0), 132)
    before = drivers.cuda_driver, execute._variant, execute.has_kernels, device.supported_card
    drivers.cuda_driver, execute._variant = lambda: driver, lambda problem: execute._cuda()
    execute.has_kernels = lambda device: True
    for planner in planners:
        planner.supported_card = lambda device: card
    try:
        yield
    finally:
        drivers.cuda_driver, execute._variant, execute.has_kernels, supported_card = before
        for planner in planners:
            planner.supported_card = supported_card


def calls(kernel: ModuleType, device: str) -> dict[str, Callable[[], Any]]:
    """By name, one call of each kind; all have precompiled kernels."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(torch.bfloat16)

    def int32(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    q, k, v = (normal(1, 128, n, DIM) for n in (HEADS, HEADS_KV, HEADS_KV))
    starts, packed = int32(0, 100, 128), (q[0], k[0], v[0])
    out, packed_out = torch.empty_like(q), torch.empty_like(q[0])
    one = normal(BATCH, 1, HEADS, DIM)
    cache = [normal(BATCH, CAPACITY, HEADS_KV, DIM) for _ in range(2)]
    pages = [x.view(-1, PAGE, HEADS_KV, DIM) for x in cache]
    table = torch.arange(len(pages[0]), dtype=torch.int32, device=device).view(BATCH, -1)
    new = [normal(BATCH, 1, HEADS_KV, DIM) for _ in range(2)]
    cos, sin = (normal(CAPACITY, DIM // 2) for _ in range(2))
    rows, each = one[:, 0], int32(*range(BATCH + 1))
    rows_out, lengths = torch.empty_like(rows), int32(*[100] * BATCH)
    longer = itertools.cycle(range(CAPACITY // 2, 20 * CAPACITY))
    dense, ragged = kernel.flash_attn_func, kernel.flash_attn_varlen_func
    cached, engine = kernel.flash_attn_with_kvcache, kernel._flash_attn_fwd
    sums = torch.zeros(1, HEADS, 128, device=device)
    states = (q, sums, torch.empty_like(q), torch.empty_like(sums))
    return {
        "dense": lambda: dense(q, k, v, causal=True),
        "dense with LSE": lambda: dense(q, k, v, causal=True, return_lse=True),
        "dense into out": lambda: dense(q, k, v, causal=True, out=out),
        "packed": lambda: ragged(*packed, starts, starts, 100, 100, causal=True),
        "packed into out": lambda: ragged(
            *packed, starts, starts, 100, 100, causal=True, out=packed_out
        ),
        "decode": lambda: cached(one, *cache, cache_seqlens=lengths, causal=True, num_splits=1),
        "decode, split": lambda: cached(
            one, *cache, cache_seqlens=lengths, causal=True, num_splits=4
        ),
        "decode from pages, split": lambda: ragged(
            rows, *pages, each, None, 1, CAPACITY, seqused_k=lengths, block_table=table,
            causal=True, num_splits=4,
        ),
        "the same as vLLM calls it": lambda: engine(
            rows, *pages, cu_seqlens_q=each, max_seqlen_q=1, max_seqlen_k=CAPACITY,
            seqused_k=lengths, page_table=table, out=rows_out, causal=True, num_splits=4,
        ),
        "the same, a maximum that is new": lambda: engine(
            rows, *pages, cu_seqlens_q=each, max_seqlen_q=1, max_seqlen_k=next(longer),
            seqused_k=lengths, page_table=table, out=rows_out, causal=True, num_splits=4,
        ),
        "append and decode, split": lambda: cached(
            one, *cache, *new, cache_seqlens=lengths, causal=True, num_splits=4
        ),
        "append, rotate and decode, split": lambda: cached(
            one, *cache, *new, cache_seqlens=lengths, causal=True, num_splits=4,
            rotary_cos=cos, rotary_sin=sin, rotary_interleaved=False,
        ),
        "merge of two states": lambda: kernel.merge_attention_states(*states),
    }  # fmt: skip


def parts(kernel: ModuleType, device: str) -> dict[str, Callable[[], Any]]:
    """By name, what a call consists of: PyTorch's and the driver's shares, and our own steps."""
    execute, repeat = (
        importlib.import_module(f"{kernel.__name__}.{name}")
        for name in ("execute", "flash_attn4_cute.repeat")
    )
    q, k, v = (
        torch.zeros(1, 128, n, DIM, device=device, dtype=torch.bfloat16)
        for n in (HEADS, HEADS_KV, HEADS_KV)
    )
    execute.repeats.clear()
    for _ in range(2):
        kernel.flash_attn_func(q, k, v, causal=True)
    (known,) = execute.repeats.values()
    (ready, writes), driver, place = known.steps[0], known.driver, q.device
    asked = (True, (-1, -1), None, None, 0.0, None, 0.0, False, 0, None, None, False, None)
    qkv, out = (q, k, v), torch.empty_like(q)
    addresses = [driver.stream(0), *(t.data_ptr() for t in (q, k, v, out))]
    found = {
        "allocation of out": lambda: driver.empty(*known.new_out),
        "torch.empty_like(q) instead": lambda: torch.empty_like(q),
        "allocation of bytes": lambda: driver.empty((70000,), (1,), torch.uint8),
        "torch.empty of bytes instead": lambda: torch.empty(70000, dtype=torch.uint8, device=place),
        "torch.zeros_like(q)": lambda: torch.zeros_like(q),
        "driver's memset": lambda: driver.fill(addresses[4], out.nbytes // 4, 0, addresses[0]),
        "current stream": lambda: driver.stream(0),
        "current device": lambda: driver.current_device(),
        "cuLaunchKernelEx alone": lambda: driver.launch(*ready.calls[0]),
        "addresses and launch": lambda: ready.issue(writes, addresses),
        "a look at the tensors": lambda: known.likeness.holds(qkv),
        "key, where they differ": lambda: repeat.key_of(asked, None, qkv, None, None),
        "all after that": lambda: known.again(qkv, None),
    }
    raw = getattr(torch._C, "_cuda_cudaCachingAllocator_raw_alloc", None)
    if raw is not None and device == "cuda":
        free = torch._C._cuda_cudaCachingAllocator_raw_delete
        found["bytes without a tensor"] = lambda: free(raw(70000, addresses[0]))
    return found


def microseconds(call: Callable[[], Any], device: str, seconds: float) -> float:
    """The best of runs of 20 calls, the device waited for in between."""
    clock, best = time.perf_counter, float("inf")
    for _ in range(3):
        call()
    end = clock() + seconds
    while clock() < end:
        if device == "cuda":
            torch.cuda.synchronize()
        start = clock()
        for _ in range(20):
            call()
        best = min(best, clock() - start)
    return best / 20 * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=0.5, help="for each figure")
    parser.add_argument("--output", type=Path, help="also as JSON")
    options = parser.parse_args()
    build_kernel()
    kernel, device = load_kernel(), options.device
    if device == "cpu":
        torch.set_num_threads(1)
    with torch.no_grad(), no_driver(kernel) if device == "cpu" else nullcontext():
        made = calls(kernel, device)
        made |= {f"part of dense: {n}": part for n, part in parts(kernel, device).items()}
        rows = [
            {"what": name, "us": round(microseconds(call, device, options.seconds), 2)}
            for name, call in made.items()
        ]
    print(table(["host time", "us"], [[row["what"], f"{row['us']:.2f}"] for row in rows]))
    if options.output:
        write_json(options.output, rows, device=device)


if __name__ == "__main__":
    main()
