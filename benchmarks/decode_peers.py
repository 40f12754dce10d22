"""The decode kernels compared, each behind one function (Cache) -> out (b, 1, h, d).

Run as a program, it serves one of them, as `peers` does; see there.

    python -m benchmarks.decode_peers NAME
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .common import L2_FLUSH_BYTES, load_kernel, time_events
from .peers import OURS, sdpa, serve
from .peers import upstream as upstream_forward

MIN_CALLS = 8  # in one graph


@dataclass(frozen=True)
class DecodeProblem:
    """One step: b sequences of one query token against kv keys each, bf16; `fp8` keys are e4m3.

    `page_size` None is a dense cache. `num_splits` is for ours; 0 lets the plan decide.
    """

    batch: int
    kv: int
    heads: int = 32
    heads_kv: int = 8
    head_dim: int = 128
    page_size: int | None = None
    num_splits: int = 0
    fp8: bool = False

    def __str__(self) -> str:
        pages = f" page {self.page_size}" if self.page_size else ""
        splits = f" splits {self.num_splits}" if self.num_splits else ""
        splits += " fp8" if self.fp8 else ""
        heads = f"h{self.heads}/{self.heads_kv} d{self.head_dim}"
        return f"b{self.batch} kv{self.kv} {heads}{pages}{splits}"

    @property
    def bytes(self) -> int:
        """Of K and V, each read once."""
        return 2 * (1 if self.fp8 else 2) * self.batch * self.kv * self.heads_kv * self.head_dim


@dataclass
class Cache:
    """q (b, 1, h, d); k, v (b, kv, h_k, d), or pages with their table; lengths (b,)."""

    problem: DecodeProblem
    q: Any
    k: Any
    v: Any
    lengths: Any
    table: Any = None

    @staticmethod
    def draw(problem: DecodeProblem, seed: int) -> "Cache":
        import torch

        gen = torch.Generator("cuda").manual_seed(seed)
        shape = (problem.batch, problem.kv, problem.heads_kv, problem.head_dim)

        def normal(*size: int):
            return torch.randn(size, generator=gen, device="cuda", dtype=torch.bfloat16)

        q = normal(problem.batch, 1, problem.heads, problem.head_dim)
        k, v = normal(*shape), normal(*shape)
        if problem.fp8:
            k, v = (x.to(torch.float8_e4m3fn) for x in (k, v))
        lengths = torch.full((problem.batch,), problem.kv, dtype=torch.int32, device="cuda")
        return Cache(problem, q, k, v, lengths)

    def paged(self) -> "Cache":
        """The same keys in pages that lie in random order."""
        import torch

        size = self.problem.page_size
        if size is None:
            return self
        per_sequence = -(-self.problem.kv // size)
        order = torch.randperm(self.problem.batch * per_sequence, device="cuda")

        def cut(x):
            pages = x.view(torch.uint8).reshape(-1, size, *x.shape[2:-1], x[0, 0, 0].nbytes)
            return pages[order].view(x.dtype)

        table = order.argsort().to(torch.int32).view(self.problem.batch, per_sequence)
        return Cache(self.problem, self.q, cut(self.k), cut(self.v), self.lengths, table)


def ours() -> Callable:
    kernel = load_kernel()

    def call(cache: Cache):
        return kernel.flash_attn_with_kvcache(
            cache.q, cache.k, cache.v, cache_seqlens=cache.lengths, block_table=cache.table,
            causal=True, num_splits=cache.problem.num_splits,
        )  # fmt: skip

    return call


def _dense_only(forward: Callable) -> Callable:
    def call(cache: Cache):
        if cache.table is not None or cache.problem.fp8:
            raise NotImplementedError("takes no pages and no fp8")
        return forward(cache.q, cache.k, cache.v, False)

    return call


IMPLEMENTATIONS: dict[str, Callable[[], Callable]] = {
    OURS: ours,
    "torch-fa2": lambda: _dense_only(sdpa("FLASH_ATTENTION")),
    "torch-cudnn": lambda: _dense_only(sdpa("CUDNN_ATTENTION")),
    "upstream-sm90": lambda: _dense_only(upstream_forward()),
}
PEERS = tuple(name for name in IMPLEMENTATIONS if name != OURS)


def _measure(call: Callable, request: dict[str, Any]) -> dict[str, Any]:
    """Microseconds a call: a graph of calls on caches of their own, together larger than the L2."""
    import torch

    problem = DecodeProblem(**request["problem"])
    count = max(1, -(-L2_FLUSH_BYTES // problem.bytes))
    dense = [Cache.draw(problem, seed) for seed in range(count)]
    first = dense[0]
    exact = (x.to(first.q.dtype) for x in (first.k, first.v))
    reference = sdpa("FLASH_ATTENTION")(first.q, *exact, False)
    caches = [cache.paged() for cache in dense]
    del dense
    out = call(caches[0])
    error = float((out.float() - reference.float()).abs().max())
    calls = [caches[n % count] for n in range(max(count, MIN_CALLS))]
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        for cache in calls:
            call(cache)
    samples = time_events(graph.replay, request["milliseconds"])
    return {"us": [1e3 * ms / len(calls) for ms in samples], "error_vs_fa2": error}


if __name__ == "__main__":
    serve(IMPLEMENTATIONS[sys.argv[1]], sys.argv[1], _measure)
