"""Forward attention for tcgen05 GPUs: sm_100a, sm_103a.

    Load --q, kv--> Mma --s--> Softmax x 2 --p, p_tail--> Mma --o--> Correction --> O, LSE
                     ^            |                                    ^   |
                     |            +------------factor, final-----------+   |
                     +---------------------------p-------------------------+

    warps   0-3, 4-7: softmax of Q tile 0 and 1   8-11: correction   12: MMA   13: load   14, 15: -
                                                            where pages are gathered, 13: K   14: V
                                                            where sequences differ, 15: schedule

One CTA computes two tiles of 128 query rows, of one head or of the heads of one key head (`rows`),
which take turns: while the tensor core works for one, the softmax of the other runs. S, P and O
live in tensor memory (`tmem`), Q and the ring of K and V blocks in shared memory. `rings` says who
waits for whom, and why that is enough: where P has columns of its own, the softmax also frees S,
and waits for the end of P V (`o`). If keys are split, the grid's second dimension counts
splits, O and LSE go to a workspace in float32, and `combine` merges them.

Where O is too wide for two, a CTA has one Q tile, whose key blocks take turns, in roles of their
own (`*_one_tile`), and no warps 4-7. Two CTAs may multiply as a pair: see `pair`.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.cute.nvgpu import cpasync

from ..arguments import ForwardArgs
from ..combine import CombineKernel, merge_of, partials
from ..common.kv import KvTile
from ..common.scheduler import TileScheduler
from ..common.tma import rows_first, smem_layout
from . import pair
from .correction import CorrectionRole
from .correction_one_tile import CorrectionOneTileRole
from .keys import GatheredKeys, KvOperand, TmaKeys
from .load import LoadRole
from .load_one_tile import LoadOneTileRole
from .mma import MmaRole
from .mma_one_tile import MmaOneTileRole
from .output import OutputStore, OutputTile
from .products import Products, SmemOperand, smem_address
from .query import QueryLoader, QueryTile
from .rings import Rings, TileRings
from .rows import RowMap, pack_heads
from .schedule import ScheduleRole
from .softmax import SoftmaxRole, Statistics
from .tiles import (
    ALIGNMENT,
    BLOCK_M,
    BLOCK_N,
    ELEMENT_BYTES,
    SCORE_SLOTS,
    STAGED_BYTES,
    TMEM_COLUMNS,
    TileConfig,
    swizzle_columns,
)
from .tmem import TmemMap
from .turns import TilesByRank, TilesFromCounter
from .work import WorkQueue


class ForwardSm100:
    """The forward kernel for one dtype, one tile configuration and the rules of mask and scores."""

    def __init__(self, dtype: type[cutlass.Numeric], cfg: TileConfig, rule, score):
        cfg.check()
        self.dtype, self.cfg, self.rule, self.score = dtype, cfg, rule, score
        self.tmem = TmemMap.of(cfg)
        self.products = Products(dtype, cfg)
        self.rows = RowMap(cfg.group)
        chunk = swizzle_columns(cfg.head_dim)
        self.q_tile = QueryTile(KvTile(dtype, BLOCK_M, cfg.head_dim, chunk, BLOCK_M), self.rows)
        self.k_tile = self.block_tile(cfg.k_rows, cfg.head_dim)
        self.v_tile = self.block_tile(BLOCK_N, cfg.v_columns)

    def block_tile(self, rows: int, columns: int) -> KvTile:
        """A block of K or V as one CTA holds it: both take slots of the same size."""
        cfg = self.cfg
        slot_columns = cfg.slot_bytes // ELEMENT_BYTES // rows
        box_n = cfg.box_n or rows
        return KvTile(
            self.dtype,
            rows,
            columns,
            swizzle_columns(columns),
            box_n,
            box_by_box=False,
            slot_columns=slot_columns,
        )

    @cute.jit
    def __call__(self, args: ForwardArgs, stream):
        num_batch = cute.size(args.mQ, mode=[0])
        if const_expr(args.mCuSeqlensQ is not None):
            num_batch = cute.size(args.mCuSeqlensQ, mode=[0]) - 1
        num_heads = cute.size(args.mQ, mode=[cute.rank(args.mQ) - 2])
        scheduler = TileScheduler.of(
            Int32(cute.ceil_div(args.max_seqlen_q, self.cfg.block_tokens)),
            Int32(num_heads // self.rows.group),
            Int32(num_batch),
        )
        mV = rows_first(args.mV)
        tma = (
            self.q_tile.tma_load(pack_heads(rows_first(args.mQ), self.rows.group), self.copy_op()),
            self.k_tile.tma_load(rows_first(args.mK), self.copy_op()),
            self.v_tile.tma_load(mV, self.copy_op()),
            self.v_tile.tma_load(mV),
            self.output_tma(args),
        )
        if const_expr(args.mWorkspace is None):
            self.launch(args, tma, scheduler, stream)
        else:
            mO, mLSE = partials(args)
            self.launch(args._replace(mO=mO, mLSE=mLSE), tma, scheduler, stream)
            head_dim_v = cute.size(args.mO, mode=[cute.rank(args.mO) - 1])
            CombineKernel(head_dim_v)(merge_of(args, mO, mLSE), stream)

    @cute.jit
    def launch(self, args: ForwardArgs, tma, scheduler: TileScheduler, stream):
        cfg = self.cfg
        # At least one pair, also on a card that the plan gives an odd number of SMs.
        most = cutlass.max(args.max_ctas // cfg.ctas, 1)
        grid = [cutlass.min(scheduler.num_tiles(), most) * cfg.ctas, args.num_splits, 1]
        if const_expr(args.mTileCounter is not None):
            # Who takes a tile also takes its split.
            grid = [cutlass.min(scheduler.num_tiles() * args.num_splits, most), 1, 1]
        self.kernel(args, tuple((atom, mX) for atom, mX in tma if atom), scheduler).launch(
            grid=grid,
            block=[cfg.num_threads, 1, 1],
            cluster=[cfg.ctas, 1, 1] if cfg.ctas > 1 else None,
            stream=stream,
            min_blocks_per_mp=1,
        )

    def output_tma(self, args: ForwardArgs) -> tuple:
        """The copy atom and TMA tensor that store O, or Nones."""
        if args.mWorkspace is not None or not OutputTile.fits(self.cfg.group):
            return None, None
        tile = OutputTile(args.mO.element_type, self.rows)
        return tile.tma_store(pack_heads(rows_first(args.mO), self.rows.group))

    def copy_op(self):
        """A copy by TMA; in a pair of CTAs, it signals the leader's barriers."""
        return cpasync.CopyBulkTensorTileG2SOp(pair.group_of(self.cfg.ctas))

    @cute.kernel
    def kernel(self, args: ForwardArgs, tma, scheduler: TileScheduler):
        cfg, roles = self.cfg, self.cfg.roles
        smem = cutlass.memory.SmemAllocator()
        rings = Rings.allocate(smem, cfg)
        counts = args.mTileCounter is not None
        tile_rings = TileRings.allocate(smem, cfg) if counts else None
        all_rings = (*rings.all(), *(tile_rings.all() if counts else ()))
        tail_barrier = smem.allocate_array(cutlass.Int64, 1)
        tmem_address = smem.allocate_array(Int32, 1)
        statistics = Statistics(*(self.allocate_statistic(smem) for _ in range(3)))
        q_layout = slots(BLOCK_M, cfg.head_dim, cfg.q_tiles)
        sQ = smem.allocate_tensor(self.dtype, q_layout.outer, ALIGNMENT, swizzle=q_layout.inner)
        kv = smem.allocate(cfg.kv_stages * cfg.slot_bytes, ALIGNMENT)
        sK = self.slots_of_ring(kv, cfg.k_rows, cfg.head_dim)
        sV = self.slots_of_ring(kv, BLOCK_N, cfg.v_columns)
        staged = STAGED_BYTES * 8 // args.mO.element_type.width
        sO = smem.allocate_tensor(
            args.mO.element_type,
            cute.make_layout((BLOCK_M, staged), stride=(staged, 1)),
            ALIGNMENT,
            swizzle=cute.make_swizzle(3, 4, 3),
        )

        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == roles.load:
            with cute.arch.elect_one():
                for ring in all_rings:
                    ring.init()
                cute.arch.mbarrier_init(tail_barrier, 1)
            cute.arch.mbarrier_init_fence()
        if warp == roles.mma:
            cute.arch.alloc_tmem(TMEM_COLUMNS, tmem_address, is_two_cta=cfg.ctas == 2)
        pair.meet(cfg.ctas)

        queue = self.queue(scheduler, tile_rings)
        if warp >= roles.correction_end:
            cute.arch.setmaxregister_decrease(cfg.registers.other)
            tiles = (sQ, sK, sV)
            if const_expr(not cfg.gathers):
                if warp == roles.load:
                    keys = self.tma_keys(tma, tiles, rings, tail_barrier, args)
                    self.load_role(True, keys, tma, tiles, rings, queue.of("load")).run(args)
            else:
                for i in cutlass.range_constexpr(2):
                    if warp == (roles.load, roles.gather_v)[i]:
                        keys = self.gathered_keys(i == 0, sK, rings, args)
                        own = queue.of(("load", "load_v")[i])
                        self.load_role(i == 0, keys, tma, tiles, rings, own).run(args)
            if warp == roles.mma and pair.leads(cfg.ctas):
                self.mma_role(sQ, sK, rings, queue.of("mma")).run(args)
            # Two questions: one is answered at trace time, one at run time.
            if const_expr(counts):  # noqa: SIM102
                if warp == roles.schedule:
                    ScheduleRole(cfg.block_tokens, scheduler, tile_rings).run(args)
        elif warp >= roles.softmax_end:
            cute.arch.setmaxregister_decrease(cfg.registers.correction)
            output = self.output_store(args, *tma[4:])
            own = queue.of("correction")
            self.correction_role(statistics, output, sO, rings, own).run(args)
        else:
            cute.arch.setmaxregister_increase(cfg.registers.softmax)
            self.softmax_role(statistics, rings, queue.of("all_softmax")).run(args)
        for ring in all_rings:
            ring.check()
        pair.meet(cfg.ctas)
        if warp == roles.mma:
            self.free_tmem(tmem_address)

    def queue(self, scheduler: TileScheduler, rings: TileRings | None) -> WorkQueue:
        """What gives the roles their work; `rings` are there if tiles come from the counter."""
        tiles: TilesByRank | TilesFromCounter = TilesByRank(scheduler, self.cfg.ctas)
        if rings is not None:
            tiles = TilesFromCounter(None, rings)
        return WorkQueue(self.cfg, self.rows, self.rule, scheduler.num_heads.divisor, tiles)

    def load_role(self, has_q: bool, keys, tma, tiles, rings: Rings, queue) -> LoadRole:
        """A load role; `tiles` are the slots of Q, K and V. The last two share their memory."""
        q = QueryLoader(self.cfg, self.q_tile, *tma[0], tiles[0], rings.q)
        heads_per_kv_head = queue.heads // cute.size(tma[1][1], mode=[2])
        role = LoadRole if self.cfg.q_tiles == 2 else LoadOneTileRole
        return role(self.cfg, q if has_q else None, keys, rings, queue, heads_per_kv_head)

    def tma_keys(self, tma, tiles, rings: Rings, tail_barrier, args: ForwardArgs) -> TmaKeys:
        return TmaKeys(
            self.cfg,
            args.mCuSeqlensK is not None or args.mSeqUsedK is not None,
            KvOperand(self.k_tile, *tma[1], tiles[1]),
            KvOperand(self.v_tile, *tma[2], tiles[2]),
            tma[3][0],
            rings,
            tail_barrier,
        )

    def gathered_keys(self, is_k: bool, sK, rings: Rings, args: ForwardArgs) -> GatheredKeys:
        tile, mX = (self.k_tile, args.mK) if is_k else (self.v_tile, args.mV)
        return GatheredKeys(self.cfg, is_k, tile, rows_first(mX), smem_address(sK), rings)

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

    def softmax_role(self, statistics: Statistics, rings: Rings, queue: WorkQueue) -> SoftmaxRole:
        """The softmax role."""
        cfg = self.cfg
        return SoftmaxRole(cfg, self.dtype, self.score, self.tmem, statistics, rings, queue)

    def output_store(self, args: ForwardArgs, tma: tuple = ()) -> OutputStore | None:
        """How O is stored by TMA; `tma` is empty if it is not."""
        if not tma:
            return None
        ends_with_memory = args.mCuSeqlensQ is None and args.mSeqUsedQ is None
        return OutputStore(OutputTile(args.mO.element_type, self.rows), ends_with_memory, *tma)

    def correction_role(
        self, statistics: Statistics, output, sO, rings: Rings, queue
    ) -> CorrectionRole:
        """The correction role."""
        role = CorrectionRole if self.cfg.q_tiles == 2 else CorrectionOneTileRole
        return role(self.cfg, self.score, self.tmem, statistics, output, sO, rings, queue)

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
