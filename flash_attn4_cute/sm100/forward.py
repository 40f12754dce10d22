"""Forward attention for tcgen05 GPUs: sm_100a, sm_103a.

    Load --q, kv--> Mma --s--> Softmax x 2 --p, p_tail--> Mma --o--> Correction --> O, LSE
                     ^            |                                    ^   |
                     |            +------------factor, final-----------+   |
                     +---------------------------p-------------------------+

    warps   0-3, 4-7: softmax of Q tile 0 and 1   8-11: correction   12: MMA   13: load   14, 15: -

One CTA computes two tiles of 128 query rows of one head, which take turns: while the tensor core
works for one, the softmax of the other runs. S, P and O live in tensor memory (`tmem`), Q and the
ring of K and V blocks in shared memory. `rings` says who waits for whom, and why that is enough.

Where O is too wide for two, a CTA has one Q tile, whose key blocks take turns, in roles of their
own (`*_one_tile`), and no warps 4-7. Two CTAs may multiply as a pair: see `pair`.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import cpasync, tcgen05

from ..arguments import ForwardArgs
from ..common.scheduler import TileScheduler
from ..common.tma import TmaOperand, rows_first, smem_layout
from . import pair
from .correction import CorrectionRole
from .correction_one_tile import CorrectionOneTileRole
from .load import LoadRole
from .load_one_tile import LoadOneTileRole
from .mma import MmaRole
from .mma_one_tile import MmaOneTileRole
from .products import Products, SmemOperand, smem_address, swizzle_columns
from .rings import Rings
from .softmax import SoftmaxRole, Statistics
from .tiles import (
    ALIGNMENT,
    BLOCK_M,
    BLOCK_N,
    ELEMENT_BYTES,
    SCORE_SLOTS,
    STAGED_COLUMNS,
    TMEM_COLUMNS,
    TileConfig,
)
from .tmem import TmemMap
from .work import WorkQueue


class ForwardSm100:
    """The forward kernel for one dtype, one tile configuration and the rules of mask and scores."""

    def __init__(self, dtype: type[cutlass.Numeric], cfg: TileConfig, rule, score):
        cfg.check()
        self.dtype, self.cfg, self.rule, self.score = dtype, cfg, rule, score
        self.tmem = TmemMap.of(cfg.head_dim_v, cfg.q_tiles)
        self.products = Products(dtype, cfg)

    @cute.jit
    def __call__(self, args: ForwardArgs, stream):
        cfg = self.cfg
        mQ, mK, mV = (rows_first(mX) for mX in (args.mQ, args.mK, args.mV))
        num_batch = cute.size(args.mQ, mode=[0])
        if cutlass.const_expr(args.mCuSeqlensQ is not None):
            num_batch = cute.size(args.mCuSeqlensQ, mode=[0]) - 1
        scheduler = TileScheduler.of(
            Int32(cute.ceil_div(args.max_seqlen_q, cfg.block_m)),
            Int32(cute.size(mQ, mode=[2])),
            Int32(num_batch),
        )
        tma = (
            self.tma_load(mQ, BLOCK_M, cfg.head_dim),
            self.tma_load(mK, cfg.k_rows, cfg.head_dim),
            self.tma_load(mV, BLOCK_N, cfg.v_columns),
            self.tma_load(mV, BLOCK_N, cfg.v_columns, tcgen05.CtaGroup.ONE),
        )
        # At least one pair, also on a card that the plan gives an odd number of SMs.
        most = cutlass.max(args.max_ctas // cfg.ctas, 1)
        self.kernel(args, tma, scheduler).launch(
            grid=[cutlass.min(scheduler.num_tiles(), most) * cfg.ctas, 1, 1],
            block=[cfg.num_threads, 1, 1],
            cluster=[cfg.ctas, 1, 1] if cfg.ctas > 1 else None,
            stream=stream,
            min_blocks_per_mp=1,
        )

    def tma_load(self, mX: cute.Tensor, rows: int, columns: int, group=None):
        """The copy atom and TMA tensor that load (rows, columns) blocks of mX.

        In a pair of CTAs, copies of the group signal the leader's barriers.
        """
        layout = cute.slice_(slots(rows, columns, 1), (None, None, 0))
        op = cpasync.CopyBulkTensorTileG2SOp(group or pair.group_of(self.cfg.ctas))
        return cpasync.make_tiled_tma_atom(op, mX, layout, (rows, columns))

    @cute.kernel
    def kernel(self, args: ForwardArgs, tma, scheduler: TileScheduler):
        cfg, roles = self.cfg, self.cfg.roles
        smem = cutlass.memory.SmemAllocator()
        rings = Rings.allocate(smem, cfg)
        tail_barrier = smem.allocate_array(cutlass.Int64, 1)
        tmem_address = smem.allocate_array(Int32, 1)
        statistics = Statistics(*(self.allocate_statistic(smem) for _ in range(3)))
        q_layout = slots(BLOCK_M, cfg.head_dim, cfg.q_tiles)
        sQ = smem.allocate_tensor(self.dtype, q_layout.outer, ALIGNMENT, swizzle=q_layout.inner)
        kv = smem.allocate(cfg.kv_stages * cfg.slot_bytes, ALIGNMENT)
        sK = self.slots_of_ring(kv, cfg.k_rows, cfg.head_dim)
        sV = self.slots_of_ring(kv, BLOCK_N, cfg.v_columns)
        sO = smem.allocate_tensor(
            self.dtype,
            cute.make_layout((BLOCK_M, STAGED_COLUMNS), stride=(STAGED_COLUMNS, 1)),
            ALIGNMENT,
            swizzle=cute.make_swizzle(3, 4, 3),
        )

        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == roles.load:
            with cute.arch.elect_one():
                for ring in rings.all():
                    ring.init()
                cute.arch.mbarrier_init(tail_barrier, 1)
            cute.arch.mbarrier_init_fence()
        if warp == roles.mma:
            cute.arch.alloc_tmem(TMEM_COLUMNS, tmem_address, is_two_cta=cfg.ctas == 2)
        pair.meet(cfg.ctas)

        queue = WorkQueue(cfg, self.rule, scheduler)
        if warp >= roles.correction_end:
            cute.arch.setmaxregister_decrease(cfg.registers.other)
            if warp == roles.load:
                self.load_role(tma, (sQ, sK, sV), rings, tail_barrier, queue, args).run(args)
            if warp == roles.mma and pair.leads(cfg.ctas):
                self.mma_role(sQ, sK, rings, queue).run(args)
        elif warp >= roles.softmax_end:
            cute.arch.setmaxregister_decrease(cfg.registers.correction)
            self.correction_role(statistics, sO, rings, queue).run(args)
        else:
            cute.arch.setmaxregister_increase(cfg.registers.softmax)
            SoftmaxRole(cfg, self.dtype, self.score, statistics, rings, queue).run(args)
        for ring in rings.all():
            ring.check()
        pair.meet(cfg.ctas)
        if warp == roles.mma:
            self.free_tmem(tmem_address)

    def load_role(self, tma, tiles, rings: Rings, tail_barrier, queue, args) -> LoadRole:
        """The load role; `tiles` are the slots of Q, K and V. The last two share their memory."""
        role = LoadRole if self.cfg.q_tiles == 2 else LoadOneTileRole
        return role(
            self.cfg,
            args.mCuSeqlensK is not None or args.mSeqUsedK is not None,
            TmaOperand(tma[0][0], tma[0][1], tiles[0]),
            TmaOperand(tma[1][0], tma[1][1], tiles[1]),
            TmaOperand(tma[2][0], tma[2][1], tiles[2]),
            tma[3][0],
            rings,
            tail_barrier,
            queue,
            queue.scheduler.num_heads.divisor // cute.size(tma[1][1], mode=[2]),
        )

    def mma_role(self, sQ, sKV, rings: Rings, queue: WorkQueue) -> MmaRole:
        """The MMA role, with shared memory as its descriptors see it."""
        cfg = self.cfg
        q_bytes = ELEMENT_BYTES * BLOCK_M * cfg.head_dim
        q, kv = smem_address(sQ), smem_address(sKV)
        role = MmaRole if cfg.q_tiles == 2 else MmaOneTileRole
        return role(
            self.products,
            self.tmem,
            SmemOperand(BLOCK_M, cfg.head_dim, q_bytes, False, q),
            SmemOperand(cfg.k_rows, cfg.head_dim, cfg.slot_bytes, False, kv),
            SmemOperand(BLOCK_N, cfg.v_columns, cfg.slot_bytes, True, kv),
            rings,
            queue,
        )

    def correction_role(self, statistics: Statistics, sO, rings: Rings, queue) -> CorrectionRole:
        """The correction role."""
        role = CorrectionRole if self.cfg.q_tiles == 2 else CorrectionOneTileRole
        return role(self.cfg, self.dtype, self.score, self.tmem, statistics, sO, rings, queue)

    def allocate_statistic(self, smem) -> cute.Tensor:
        """One float a row, for each slot of S."""
        return smem.allocate_tensor(Float32, cute.make_layout((BLOCK_M, SCORE_SLOTS)), 16)

    def slots_of_ring(self, memory: cute.Pointer, rows: int, columns: int) -> cute.Tensor:
        """The ring of K and V as (rows, columns, slots): both take slots of the same size."""
        one = slots(rows, columns, 1)
        stride = self.cfg.slot_bytes // ELEMENT_BYTES
        layout = cute.append(
            cute.select(one.outer, mode=[0, 1]), cute.make_layout(self.cfg.kv_stages, stride=stride)
        )
        pointer = cute.recast_ptr(memory, one.inner, self.dtype)
        return cute.make_tensor(pointer, layout)

    def free_tmem(self, tmem_address: cute.Pointer):
        """All of tensor memory was taken, so its first column is 0: `TmemMap` relies on it."""
        pointer = cute.arch.retrieve_tmem_ptr(Float32, 16, tmem_address)
        two = self.cfg.ctas == 2
        cute.arch.relinquish_tmem_alloc_permit(is_two_cta=two)
        cute.arch.dealloc_tmem(pointer, TMEM_COLUMNS, is_two_cta=two)


def slots(rows: int, columns: int, number: int) -> cute.ComposedLayout:
    """(rows, columns, number) as `SmemOperand` describes it."""
    return smem_layout(rows, columns, number, swizzle_columns(columns))
