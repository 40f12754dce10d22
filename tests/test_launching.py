"""Launches where programs put them: in compiled functions, graphs, threads, and on several cards.

What is computed is judged elsewhere. Here each answer has the bits of a plain call of its own.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._dynamo.utils import counters

from .cases import BF16

BATCH, HEADS, HEADS_KV, D, CAPACITY, PAGE = 3, 8, 2, 64, 512, 16


class Work:
    """Tensors on one device, and calls on them that take every way of launching there is."""

    def __init__(self, fa4, device: torch.device, seed: int = 0, tokens: int = 200):
        self.fa4, gen = fa4, torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=gen).to(device, BF16)

        def int32(*values: int) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        self.qkv = [normal(2, tokens, n, D) for n in (HEADS, HEADS_KV, HEADS_KV)]
        self.packed = [x.flatten(0, 1) for x in self.qkv]
        self.longest, self.starts = tokens + 70, int32(0, tokens - 70, 2 * tokens)
        self.row = normal(BATCH, 1, HEADS, D)
        self.new = [normal(BATCH, 1, HEADS_KV, D) for _ in range(2)]
        self.cache = [normal(BATCH * CAPACITY // PAGE, PAGE, HEADS_KV, D) for _ in range(2)]
        self.table = int32(*range(len(self.cache[0]))).flip(0).view(BATCH, -1)
        self.lengths = int32(CAPACITY - 1, 100, 0)
        self.turns = [normal(CAPACITY, D // 2) for _ in range(2)]

    def dense(self, *qkv):
        return self.fa4.flash_attn_func(*(qkv or self.qkv), causal=True, return_lse=True)

    def ragged(self, *packed):
        return self.fa4.flash_attn_varlen_func(
            *(packed or self.packed), self.starts, self.starts, self.longest, self.longest,
            causal=True, return_lse=True,
        )  # fmt: skip

    def decode(self, row=None):
        """Partial results in a workspace, and their merge."""
        return self.fa4.flash_attn_with_kvcache(
            self.row if row is None else row, *self.cache, cache_seqlens=self.lengths,
            block_table=self.table, num_splits=4, causal=True, return_lse=True,
        )  # fmt: skip

    def append(self, row=None):
        """The same after new tokens, which are written where they were before."""
        cos, sin = self.turns
        return self.fa4.flash_attn_with_kvcache(
            self.row if row is None else row, *self.cache, *self.new, cache_seqlens=self.lengths,
            block_table=self.table, rotary_cos=cos, rotary_sin=sin, rotary_interleaved=False,
            num_splits=4, causal=True, return_lse=True,
        )  # fmt: skip

    def calls(self):
        return self.dense, self.ragged, self.decode, self.append


def same(found, expected) -> bool:
    """Whether two answers have the same bits, on whatever devices they are."""
    pairs = zip(found, expected, strict=True)
    return all(torch.equal(a.cpu().view(torch.int16), b.cpu().view(torch.int16)) for a, b in pairs)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("name", ["dense", "ragged", "decode", "append"])
def test_compiled_once_for_all_lengths(fa4, device, name, mode):
    """One graph for the first length and one for all others, without a break; LSE included."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(lambda call, *x: call(*x), fullgraph=True, mode=mode)
    with torch.no_grad():
        for tokens in (200, 130, 257, 300, 200):
            work = Work(fa4, device, tokens, tokens)
            given = {"dense": work.qkv, "ragged": work.packed}.get(name, [work.row])
            call = getattr(work, name)
            torch.compiler.cudagraph_mark_step_begin()
            assert same(compiled(call, *given), call(*given)), tokens
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.gpu
def test_threads_on_streams_of_their_own(fa4, device):
    """Eager calls and a graph's replays at once: no two of them share scratch memory."""
    works = [Work(fa4, device, seed) for seed in range(3)]
    expected = [[call() for call in work.calls()] for work in works]
    streams = [torch.cuda.Stream() for _ in works]
    torch.cuda.synchronize()
    graph, wrong = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph, stream=streams[0]):
        captured = [call() for call in works[0].calls()]

    def replay():
        for _ in range(60):
            for answer in captured:
                for x in answer:
                    x.fill_(torch.nan)
            graph.replay()
            yield from zip(captured, expected[0], strict=True)

    def eager(number: int):
        for _ in range(60):
            for call, right in zip(works[number].calls(), expected[number], strict=True):
                yield call(), right

    def run(number: int, answers) -> None:
        with torch.cuda.stream(streams[number]):
            wrong.extend(number for found, right in answers if not same(found, right))

    answers = (replay(), eager(1), eager(2))
    with ThreadPoolExecutor(len(works)) as pool:
        # A thread's exception is the test's.
        list(pool.map(run, range(len(works)), answers))
    assert not wrong and captured[0][0].isfinite().all()


@pytest.mark.gpu
def test_a_thread_that_starts_with_a_launch(fa4, device):
    """A new thread has no context until somebody gives it one."""
    work, found = Work(fa4, device), []
    expected = work.append()
    thread = threading.Thread(target=lambda: found.append(work.append()))
    thread.start()
    thread.join()
    assert same(found[0], expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_on_another_card_than_the_current_one(fa4, device):
    """First calls and repeated ones go to the card of their tensors, by that card's streams."""
    here, there = (Work(fa4, torch.device("cuda", n)) for n in (0, 1))
    with torch.cuda.device(0):
        for _ in range(3):
            for call, other in zip(here.calls(), there.calls(), strict=True):
                answer = other()
                assert same(answer, call())
                assert {x.device.index for x in answer} == {1}
        assert torch.cuda.current_device() == 0
        with pytest.raises(ValueError, match="device"):
            fa4.flash_attn_func(here.qkv[0], *there.qkv[1:])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(1):
            # The stream that PyTorch would take is of the card where it captured first.
            with torch.cuda.graph(graph, stream=torch.cuda.Stream(1)):
                captured = there.append()
            captured[0].fill_(torch.nan)
            graph.replay()
        assert same(captured, here.append())
