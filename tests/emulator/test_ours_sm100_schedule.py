"""The tcgen05 kernel's tiles from a counter: each is taken once, in order, and by whoever asks."""

from collections.abc import Iterator

import cutlass
import cutlass.cute as cute
import pytest
import torch
from cutlass import Int32

import ptx_emulator
from flash_attn4_cute.arguments import ForwardArgs
from flash_attn4_cute.common.scheduler import TileScheduler
from flash_attn4_cute.sm100.rings import Arrivals, Ring, TileRings
from flash_attn4_cute.sm100.schedule import ScheduleRole
from flash_attn4_cute.sm100.tiles import TILE_SLOTS, TILE_WORDS, WarpRoles
from flash_attn4_cute.sm100.turns import TilesFromCounter

BLOCK, HEADS = 10, 3  # tokens of a tile
MANY = [7 * i % 19 for i in range(40)]  # sequences, more than a warp has lanes; one without tokens


def two_warps(smem) -> TileRings:
    """Where a warp that asks as the load role does is the only one that takes tiles."""

    def ring(name: str, slots: int, full_by: str, empty_by: str) -> Ring:
        by = (Arrivals(WarpRoles.of(2), tuple(roles.split())) for roles in (full_by, empty_by))
        return Ring(name, slots, *by, 1, smem.allocate_array(cutlass.Int64, 2 * slots))

    return TileRings(
        ring("tile", TILE_SLOTS, "schedule", "load"),
        ring("ask", 1, "load", ""),
        smem.allocate_tensor(Int32, cute.make_layout((TILE_WORDS, TILE_SLOTS)), 16),
    )


@cute.kernel
def take(args: ForwardArgs, mSeen: cute.Tensor, mOrder: cute.Tensor, scheduler: TileScheduler):
    """Two warps a CTA: one schedules, the other counts in `mSeen` what it is told."""
    smem = cutlass.memory.SmemAllocator()
    rings = two_warps(smem)
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    if warp == 0:
        with cute.arch.elect_one():
            for ring in rings.all():
                ring.init()
        cute.arch.mbarrier_init_fence()
    cute.arch.sync_threads()
    cta, _, _ = cute.arch.block_idx()
    if warp == 0:
        ScheduleRole(BLOCK, scheduler, rings).run(args)
    else:
        tiles = TilesFromCounter("load", rings)
        turn = Int32(0)
        while tiles.has_tile(turn):
            tile, seqlen = tiles.tile(args, turn)
            tiles.ask()
            if cute.arch.lane_idx() == 0:
                seen = mSeen[tile.batch, tile.head, tile.split, tile.m_block, None]
                cute.arch.atomic_add(seen.iterator, Int32(1))
                seen[1], seen[2] = seqlen.offset_q, seqlen.seqlen_q
                seen[3], seen[4] = seqlen.offset_k, seqlen.seqlen_k
                mOrder[cta, turn, 0], mOrder[cta, turn, 1] = tile.batch, tile.m_block
            turn += 1


@cute.jit
def launch(args: ForwardArgs, mSeen: cute.Tensor, mOrder: cute.Tensor):
    num_batch = cute.size(args.mCuSeqlensQ) - 1
    scheduler = TileScheduler.of(Int32(4), Int32(HEADS), Int32(num_batch))
    take(args, mSeen, mOrder, scheduler).launch(
        grid=[cute.size(mOrder, mode=[0]), 1, 1], block=[64, 1, 1]
    )


def taken(
    lengths: list[int], ctas: int, splits: int, schedules: tuple[int, ...] = (0,), start: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """How often each (sequence, head, split, block) was taken, with its lengths; (sequence, block)
    by CTA and turn, -1 behind the last. `start` is what the counter begins with."""
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    x = torch.zeros(2 * int(cu[-1]) + 1, HEADS, 8)
    given = {
        "mQ": x, "mK": x, "mCuSeqlensQ": cu, "mCuSeqlensK": 2 * cu, "mWorkspace": x.flatten(),
        "mTileCounter": torch.empty(1, dtype=torch.int32), "num_splits": splits,
    }  # fmt: skip
    args = ForwardArgs(*[None] * len(ForwardArgs._fields))._replace(**given)
    seen = torch.empty(len(lengths), HEADS, splits, 4, 5, dtype=torch.int32)
    order = torch.empty(ctas, 4 * len(lengths) * HEADS * splits, 2, dtype=torch.int32)

    def standin(value):
        if not torch.is_tensor(value):
            return None if value is None else Int32(value)
        kind = cutlass.Float32 if value.dtype is torch.float32 else Int32
        ranks = tuple(range(value.dim()))[::-1]
        return cute.runtime.make_fake_compact_tensor(kind, tuple(value.shape), stride_order=ranks)

    compiled = None
    for schedule in schedules:
        with ptx_emulator.session("sm_100a", schedule=schedule, strict=True) as emulator:
            if compiled is None:
                standins = ForwardArgs(*map(standin, args)), standin(seen), standin(order)
                options = "--enable-tvm-ffi --gpu-arch sm_100a"
                compiled = cute.compile(launch, *standins, options=options)
            args.mTileCounter.fill_(start)
            emulator.call(compiled, args, seen.zero_(), order.fill_(-1))
        yield seen, order


def once(lengths: list[int], splits: int) -> torch.Tensor:
    """Each tile that has queries once, with the lengths of its sequence."""
    expected = torch.zeros(len(lengths), HEADS, splits, 4, 5, dtype=torch.int32)
    begin = 0
    for i, length in enumerate(lengths):
        values = torch.tensor([1, begin, length, 2 * begin, 2 * length])
        expected[i, :, :, : -(-length // BLOCK)] = values.to(torch.int32)
        begin += length
    return expected


@pytest.mark.parametrize(
    ("lengths", "ctas", "splits"),
    [([0, 11, 40, 1, 0, 25], 3, 1), (MANY, 5, 1), ([0, 0, 21], 4, 3), ([0, 0], 2, 1), ([9], 6, 2)],
)
def test_every_tile_once(lengths, ctas, splits):
    """Also with more CTAs than tiles, without any, and of more sequences than a warp ranks."""
    for seen, order in taken(lengths, ctas, splits, (0, 3, 6)):
        assert torch.equal(seen, once(lengths, splits))
        for cta in order.tolist():
            ranks = [(b // 32, -lengths[b], b, -block) for b, block in cta if b >= 0]
            assert ranks == sorted(ranks), "most keys first, of each 32; last queries first"


@pytest.mark.parametrize("start", [-1, 1])
def test_a_counter_that_was_not_cleared_is_seen(start):
    """What the test above would find: a tile twice, or never."""
    lengths = [5, 11, 40, 25]
    ((seen, _),) = taken(lengths, 2, 1, start=start)
    wrong = seen[..., 0] - once(lengths, 1)[..., 0]
    assert wrong.abs().sum() == 1 and wrong.sum() == -start
