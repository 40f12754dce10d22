"""Published bugs of attention kernels, as cases that run on a CPU, in the emulator and on a GPU.

Each row names the threads that reported a bug and holds cases small enough for the emulator; what
only larger cases or another kind of test can show is listed in README.md beside the row.
"""

from collections.abc import Iterator
from itertools import product

from .cases import F16, VARLEN_LENGTHS, Case

STAGES = 6  # the most K/V slots of any row of tiles


def _case(name: str, **changes) -> Case:
    """A small case: one kernel, d 64, serves many."""
    few = {"d": 64, "heads": 2, "heads_kv": 1, "seqlens_q": (33,), "seqlens_k": (70,)}
    return Case(name=name, **(few | changes))


def _boundaries() -> Iterator[Case]:
    for sq in (1, 127, 129, 255, 257):
        yield _case(f"sq{sq}", seqlens_q=(sq,), seqlens_k=(sq,), causal=True, heads=1)
    for ratio in (3, 5, 6, 7, 10, 12):
        yield _case(f"gqa{ratio}", seqlens_q=(5,), heads=ratio, causal=True)
        yield _case(f"gqa{ratio}_packed", seqlens_q=(5,), heads=ratio, causal=True, pack_gqa=True)


def _encodings() -> Iterator[Case]:
    windows = (None, (-1, -1), (-1, 0), (None, 0), (20, 0), (20, -1), (5000, 5000))
    for causal, window in product((False, True), windows):
        yield _case(f"window_{window}_{causal}", causal=causal, window=window)


def _pages() -> Iterator[Case]:
    for size in (1, 8, 16, 32, 64, 128, 256):
        yield _case(
            f"page{size}", layout="paged", page_size=size, seqlens_q=(2, 0, 4), causal=True,
            seqlens_k=(70, 40, 130), used_k=(70, 0, 129),
        )  # fmt: skip


def _splits() -> Iterator[Case]:
    for splits in (2, 7):
        yield _case(
            f"splits{splits}", layout="varlen", num_splits=splits, causal=True,
            seqlens_q=(1, 0, 2, 3, 0), seqlens_k=(1, 7, 0, 300, 64),
        )  # fmt: skip


def _rings() -> Iterator[Case]:
    """Every slot used once, twice and once more, and odd numbers of query blocks."""
    for blocks in (1, 2, STAGES, 2 * STAGES + 1):
        yield _case(f"blocks{blocks}", seqlens_q=(3,), seqlens_k=(64 * blocks,), heads=1)
    yield _case("odd_blocks", seqlens_q=(513,), seqlens_k=(65,), heads=1, causal=True)


def _empty() -> Iterator[Case]:
    for layout in ("dense", "varlen"):
        yield _case(f"{layout}_sk0", layout=layout, seqlens_q=(5, 5), seqlens_k=(0, 0))
        yield _case(f"{layout}_sq0", layout=layout, seqlens_q=(0, 0), seqlens_k=(7, 7))
        yield _case(f"{layout}_b0", layout=layout, seqlens_q=(), seqlens_k=())
    yield _case("used0", seqlens_q=(5, 5), seqlens_k=(70, 70), used_k=(0, -1), causal=True)


ZEROS_Q, ZEROS_K = VARLEN_LENGTHS["interleaved_zeros"]

ROWS: dict[str, tuple[Case, ...]] = {
    "FA2760_packed_splits": tuple(_splits()),
    "FA2470_nothing_to_do": tuple(_empty()),
    "CFE575_zero_lengths_between": (
        _case("zeros", layout="varlen", seqlens_q=ZEROS_Q, seqlens_k=ZEROS_K, causal=True),
    ),
    "FA2508_every_tile_once": (
        _case("tiles", seqlens_q=(300,) * 2, seqlens_k=(64,) * 2, heads=5),
    ),
    "FA2665_strides": tuple(
        _case(
            strides, strides=strides, seqlens_q=(33,) * 2, seqlens_k=(33,) * 2, heads=4, heads_kv=2
        )
        for strides in (
            "transposed", "padded", "interleaved_kv", "packed_qkv", "sliced", "shifted_by_one",
            "odd_stride", "expanded_batch", "expanded_heads",
        )
    ),
    "FA2303_pages": tuple(_pages()),
    "FA2091_boundaries": tuple(_boundaries()),
    "FA2329_causal_blocks": (
        _case("masked_blocks", seqlens_q=(257,), seqlens_k=(257,), causal=True, fill="peaked"),
    ),
    "TE3528_windows": tuple(_encodings()),
    "FA2396_softcap": (_case("softcap", softcap=2.0, softmax_scale=20.0, fill="peaked"),),
    "TE3216_activations": (
        _case("outlier", fill="outlier", seqlens_q=(65,) * 3, seqlens_k=(97,) * 3, causal=True),
        _case("outlier16", fill="outlier", seqlens_q=(65,) * 2, seqlens_k=(97,) * 2, dtype=F16),
    ),
    "RINGS_blocks_and_stages": tuple(_rings()),
}  # fmt: skip

PARAMETERS = [(row, case) for row, members in ROWS.items() for case in members]
NAMES = [f"{row}-{case.name}" for row, case in PARAMETERS]
