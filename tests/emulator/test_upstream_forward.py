"""Upstream's forward kernels, unmodified and known to be right on real chips, against float64.

Whatever fails here is the emulator's fault until shown otherwise. Compiling takes most of the time,
so cases stand under the kernel that they share: lengths are no part of upstream's compile key.
"""

import importlib.util
from dataclasses import dataclass, field

import pytest
import torch

import ptx_emulator
from ptx_emulator.cli.case import Case, Inputs, judge, make_inputs

from . import upstream

BF16, F16 = torch.bfloat16, torch.float16
PAIR, ONE = (2, 1, 1), (1, 1, 1)  # clusters


@dataclass(frozen=True)
class Kernel:
    """What upstream compiles once, and the shapes that it is run with.

    A shape is (batch, sq, sk, schedule), with the bounds of a window behind that if there is one.
    """

    name: str
    arch: str
    shapes: list[tuple[int, ...]]
    head_dim: int = 128
    head_dim_v: int | None = None
    heads: tuple[int, int] = (1, 1)
    dtype: torch.dtype = BF16
    causal: bool = False
    varlen: bool = False
    used: bool = False  # lengths by seqused_q and seqused_k
    sink: bool = False
    softcap: float = 0.0
    page_size: int | None = None
    num_splits: int = 1
    cluster: tuple[int, int, int] = ONE
    holds: tuple[str, ...] = field(default=())  # instructions that show which variant this is

    def case(self, shape: tuple[int, ...]) -> Case:
        batch, rows, keys, _, *window = shape
        left, right = window or (None, 0 if self.causal else None)
        return Case(
            dtype=self.dtype,
            batch=batch,
            heads=self.heads[0],
            kv_heads=self.heads[1],
            seqlen_q=rows,
            seqlen_k=keys,
            head_dim=self.head_dim,
            head_dim_v=self.head_dim_v or self.head_dim,
            left=left,
            right=right,
            softcap=self.softcap,
            sink=self.sink,
            varlen=self.varlen or self.used,
            page_size=self.page_size,
            num_splits=self.num_splits,
            seed=rows + keys,
        )


ONE_TILE = [(1, 128, 128, 0), (2, 77, 257, 1)]
TWO_TILES = [(1, 256, 256, 0), (1, 129, 300, 2)]
PAIRS = [(1, 512, 512, 0), (1, 300, 130, 1), (2, 257, 384, 5)]
CAUSAL = [(1, 300, 300, 0), (2, 130, 257, 3), (1, 200, 70, 4)]  # the last has blind rows
FEW = [(1, 130, 257, 0), (1, 300, 200, 6)]
TMA_PAGES, COPIED_PAGES = ("cp.async.bulk.tensor",), ("cp.async.cg",)

KERNELS = [
    # ---- sm_100a: dense and causal ----
    Kernel("one-tile", "sm_100a", [*ONE_TILE, (1, 1, 300, 2), (3, 5, 1, 3)]),
    Kernel("dense", "sm_100a", [*TWO_TILES, (2, 140, 1, 8)]),
    Kernel("pair", "sm_100a", PAIRS, cluster=PAIR, holds=("cta_group::2",)),
    Kernel("pair-f16", "sm_100a", [(1, 300, 257, 0)], dtype=F16, cluster=PAIR),
    Kernel("pair-gqa", "sm_100a", [(1, 200, 200, 0)], heads=(2, 1), cluster=PAIR),
    Kernel("causal", "sm_100a", CAUSAL, causal=True),
    Kernel("causal-gqa", "sm_100a", FEW, heads=(4, 2), causal=True),
    Kernel("causal-gqa3", "sm_100a", [(1, 130, 150, 7)], heads=(3, 1), causal=True),
    Kernel("decode-gqa", "sm_100a", [(2, 1, 300, 0), (1, 5, 129, 1)], heads=(8, 1), causal=True),
    Kernel("d64", "sm_100a", [*TWO_TILES, (1, 300, 128, 1)], head_dim=64),
    Kernel("d64-causal", "sm_100a", CAUSAL, head_dim=64, causal=True),
    Kernel("d64-f16-gqa", "sm_100a", FEW, head_dim=64, heads=(2, 1), dtype=F16, causal=True),
    Kernel("wide-pair", "sm_100a", PAIRS[1:], 192, 128, cluster=PAIR, holds=("cta_group::2",)),
    Kernel("wide", "sm_100a", [(1, 200, 300, 0)], 192, 128),
    Kernel("wide-causal", "sm_100a", CAUSAL[:2], 192, 128, causal=True),
    # ---- sm_100a: masks, sinks, softcap ----
    Kernel("window", "sm_100a", [(1, 300, 300, 0, 100, 20), (1, 130, 400, 2, 0, 0)]),
    Kernel("window-left", "sm_100a", [(1, 257, 400, 3, 130, 0)], head_dim=64, heads=(2, 1)),
    Kernel("sink", "sm_100a", FEW[:1], heads=(2, 1), sink=True, causal=True),
    Kernel("d64-sink", "sm_100a", TWO_TILES, head_dim=64, heads=(2, 2), sink=True),
    Kernel("sink-window", "sm_100a", [(1, 150, 400, 1, 90, 0)], heads=(2, 1), sink=True),
    Kernel("softcap", "sm_100a", FEW[:1], softcap=15.0, causal=True),
    # ---- sm_100a: packed sequences, pages, splits ----
    Kernel("varlen", "sm_100a", [(3, 200, 300, 0), (4, 130, 140, 2)], heads=(2, 1), varlen=True),
    Kernel("varlen-causal", "sm_100a", [(3, 270, 270, 1)], varlen=True, causal=True),
    Kernel(
        "varlen-d64", "sm_100a", [(3, 150, 200, 0), (5, 140, 90, 3)], 64, varlen=True, causal=True
    ),
    Kernel("used", "sm_100a", [(3, 200, 300, 0)], heads=(2, 1), used=True, causal=True),
    Kernel(
        "pages-128", "sm_100a", [(2, 100, 300, 0)], heads=(2, 1), page_size=128, holds=TMA_PAGES
    ),
    Kernel(
        "pages-16", "sm_100a", [(2, 100, 300, 0), (1, 70, 40, 3)], page_size=16, holds=COPIED_PAGES
    ),
    Kernel(
        "pages-64-gqa", "sm_100a", [(2, 1, 200, 1)], heads=(4, 1), page_size=64, holds=COPIED_PAGES
    ),
    Kernel("splits", "sm_100a", [(1, 64, 600, 0), (2, 100, 300, 1)], causal=True, num_splits=3),
    Kernel("splits-gqa", "sm_100a", [(1, 3, 900, 0)], heads=(4, 1), num_splits=4),
    Kernel("splits-d64", "sm_100a", [(1, 130, 500, 2)], 64, num_splits=2),
    Kernel("splits-pages", "sm_100a", [(2, 1, 500, 0)], heads=(4, 1), page_size=128, num_splits=2),
    # ---- sm_103a ----
    Kernel("one-tile", "sm_103a", ONE_TILE),
    Kernel("pair", "sm_103a", PAIRS[:2], cluster=PAIR, holds=("cta_group::2",)),
    Kernel("causal", "sm_103a", CAUSAL, heads=(2, 1), causal=True, holds=("ld.red",)),
    Kernel("d64", "sm_103a", [*TWO_TILES], head_dim=64),
    Kernel("wide-causal", "sm_103a", CAUSAL[:1], 192, 128, causal=True),
    Kernel("varlen", "sm_103a", [(3, 200, 300, 0)], heads=(2, 1), varlen=True, causal=True),
    # ---- sm_90a and sm_120a ----
    Kernel("dense", "sm_90a", [*ONE_TILE, (1, 300, 300, 2)]),
    Kernel("causal-gqa", "sm_90a", CAUSAL, heads=(2, 1), causal=True),
    Kernel("d64-f16", "sm_90a", CAUSAL[:2], head_dim=64, dtype=F16, causal=True),
    Kernel("window", "sm_90a", [(1, 200, 300, 1, 90, 10)], head_dim=64),
    Kernel("varlen", "sm_90a", [(3, 200, 300, 0)], heads=(2, 1), varlen=True, causal=True),
    Kernel("dense", "sm_120a", [*ONE_TILE, (1, 300, 200, 2)]),
    Kernel("causal-gqa", "sm_120a", CAUSAL, heads=(2, 1), causal=True),
    Kernel("d64-f16", "sm_120a", CAUSAL[:2], head_dim=64, dtype=F16, causal=True),
    Kernel("window", "sm_120a", [(1, 130, 300, 1, 90, 10)], head_dim=64),
    Kernel("varlen", "sm_120a", [(3, 150, 200, 0)], heads=(2, 1), varlen=True, causal=True),
]
CASES = [
    pytest.param(kernel, shape, id="-".join(map(str, [kernel.arch, kernel.name, *shape])))
    for kernel in KERNELS
    for shape in kernel.shapes
]


def options_of(case: Case, inputs: Inputs) -> dict:
    """Keyword arguments of upstream's forward, but for those that say where keys lie."""
    options = {"num_splits": case.num_splits}
    if (case.left, case.right) == (None, 0):
        options["causal"] = True
    elif (case.left, case.right) != (None, None):
        options |= {"window_size_left": case.left, "window_size_right": case.right}
    if case.sink:
        options["learnable_sink"] = inputs.sink
    if case.softcap:
        options["softcap"] = case.softcap
    return options


def paged(case: Case, inputs: Inputs) -> dict:
    """k and v in shuffled pages; the pages that no table names hold what would ruin a result."""
    size = case.page_size
    pages = -(-case.seqlen_k // size)
    draw = torch.Generator().manual_seed(case.seed)
    places = torch.randperm(case.batch * pages + 2, generator=draw)[: case.batch * pages]
    table = places.view(case.batch, pages)

    def pool(x):
        full = torch.full((case.batch * pages + 2, size, *x.shape[2:]), 1e4, dtype=x.dtype)
        rows = x.new_zeros(case.batch, pages * size, *x.shape[2:])
        rows[:, : case.seqlen_k] = x
        full[places] = rows.view(case.batch * pages, size, *x.shape[2:])
        return full

    used = torch.full((case.batch,), case.seqlen_k, dtype=torch.int32)
    return {
        "k": pool(inputs.k),
        "v": pool(inputs.v),
        "page_table": table.to(torch.int32),
        "seqused_k": used,
    }


def padded(case: Case, inputs: Inputs) -> dict:
    """Packed sequences as rows of a batch; lengths are told by seqused."""

    def rows(x, ends, longest):
        full = torch.full((case.batch, longest, *x.shape[1:]), 1e4, dtype=x.dtype)
        for b in range(case.batch):
            full[b, : ends[b + 1] - ends[b]] = x[ends[b] : ends[b + 1]]
        return full

    return {
        "q": rows(inputs.q, inputs.cu_q, case.seqlen_q),
        "k": rows(inputs.k, inputs.cu_k, case.seqlen_k),
        "v": rows(inputs.v, inputs.cu_k, case.seqlen_k),
        "seqused_q": inputs.cu_q.diff(),
        "seqused_k": inputs.cu_k.diff(),
    }


def packed(case: Case, inputs: Inputs) -> dict:
    return {
        "cu_seqlens_q": inputs.cu_q,
        "cu_seqlens_k": inputs.cu_k,
        "max_seqlen_q": case.seqlen_q,
        "max_seqlen_k": case.seqlen_k,
    }


def unpadded(inputs: Inputs, out, lse):
    """The rows that count, packed."""
    sizes = list(enumerate(inputs.cu_q.diff().tolist()))
    return (
        torch.cat([out[b, :n] for b, n in sizes]),
        torch.cat([lse[b, :, :n] for b, n in sizes], 1),
    )


def run(kernel: Kernel, shape: tuple[int, ...]):
    """The verdict on one call of upstream's forward, and its launches."""
    case = kernel.case(shape)
    inputs = make_inputs(case)
    arguments = {"q": inputs.q, "k": inputs.k, "v": inputs.v, **options_of(case, inputs)}
    if kernel.page_size:
        arguments |= paged(case, inputs)
    elif kernel.used:
        arguments |= padded(case, inputs)
    elif kernel.varlen:
        arguments |= packed(case, inputs)
    launches = []
    with (
        ptx_emulator.session(kernel.arch, schedule=shape[3]) as emulator,
        upstream.upstream_on(emulator) as module,
    ):
        plain = emulator.host.on_launch
        emulator.host.on_launch = lambda launch: (launches.append(launch), plain(launch))
        out, lse = upstream.forward(module, **arguments)
    if kernel.used:
        out, lse = unpadded(inputs, out, lse)
    return judge(case, inputs, out, lse), launches


@pytest.mark.parametrize(("kernel", "shape"), CASES)
def test_forward(kernel, shape):
    if importlib.util.find_spec("flash_attn") is None:
        pytest.skip("upstream flash-attn-4 is not installed")
    verdict, launches = run(kernel, shape)
    attention = launches[-2 if kernel.num_splits > 1 else -1]
    assert attention.cluster == kernel.cluster
    assert all(name in attention.ptx for name in kernel.holds), "this is another variant"
    assert verdict.ok, verdict


def test_there_are_enough():
    assert len(CASES) >= 80
    assert {kernel.arch for kernel in KERNELS} == set(upstream.ARCH)
