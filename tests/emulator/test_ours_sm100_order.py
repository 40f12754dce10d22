"""The order in which the tcgen05 kernel takes tiles of sequences that differ."""

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Int32

import ptx_emulator
from flash_attn4_cute.arguments import ForwardArgs
from flash_attn4_cute.common.scheduler import TileScheduler
from flash_attn4_cute.sm100.order import tile_of_index


@cute.kernel
def record(mX: cute.Tensor, mCu: cute.Tensor, mOut: cute.Tensor, scheduler: TileScheduler):
    """Each CTA, a warp, writes the (block of queries, head, sequence) that it takes."""
    nothing = ForwardArgs(*[None] * len(ForwardArgs._fields))
    args = nothing._replace(mQ=mX, mK=mX, mCuSeqlensK=mCu)
    index, _, _ = cute.arch.block_idx()
    tile = tile_of_index(args, scheduler, index)
    if cute.arch.lane_idx() == 0:
        mOut[index, 0], mOut[index, 1], mOut[index, 2] = tile.m_block, tile.head, tile.batch


@cute.jit
def launch(mX: cute.Tensor, mCu: cute.Tensor, mOut: cute.Tensor):
    scheduler = TileScheduler.of(Int32(2), Int32(3), Int32(cute.size(mCu) - 1))
    record(mX, mCu, mOut, scheduler).launch(
        grid=[cute.size(mOut, mode=[0]), 1, 1], block=[32, 1, 1]
    )


def order_of(lengths: list[int]) -> list[list[int]]:
    """The tiles of two blocks of queries and three heads a sequence, in order."""
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    out = torch.full((6 * len(lengths), 3), -1, dtype=torch.int32)
    x = torch.zeros(1, 8, 3, 8)
    with ptx_emulator.session("sm_100a", strict=True) as emulator:
        standins = [
            cute.runtime.make_fake_compact_tensor(kind, tuple(t.shape), stride_order=order)
            for kind, t, order in (
                (cutlass.Float32, x, (3, 2, 1, 0)), (Int32, cu, (0,)), (Int32, out, (1, 0)),
            )
        ]  # fmt: skip
        compiled = cute.compile(launch, *standins, options="--enable-tvm-ffi --gpu-arch sm_100a")
        emulator.call(compiled, x, cu, out)
    return out.tolist()


def test_most_keys_first():
    """By their keys, equals in their order; the last queries first, heads side by side."""
    expected = [[m, h, b] for b in (1, 2, 4, 0, 3) for m in (1, 0) for h in range(3)]
    assert order_of([5, 9, 9, 0, 7]) == expected


def test_many_sequences():
    """Of more than a warp can rank: blocks equally far from their sequences' ends together."""
    expected = [[m, h, b] for m in (1, 0) for b in range(33) for h in range(3)]
    assert order_of(list(range(33))) == expected
