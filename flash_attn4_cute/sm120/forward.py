"""Forward attention for mma.sync GPUs: sm_120a, sm_121a, sm_90a.

                 kv_ring (K, V, K, V ...)
    LoadRole  ------------------------->  ComputeRole x 8 warps  --->  O, LSE
    (1 thread) <------------------------    32 query rows each
                 slots freed, 8 arrivals       ^
                                               | Q, by the warp's own cp.async

One CTA computes 256 query rows of one head; above d 128, where O takes twice the registers a row,
16 rows a warp and 128 in all. The load warp streams the key blocks of that tile from the last to
the first; the eight compute warps consume them at their own pace, each waiting only for data. Every
slot of the ring holds one block of K or of V and is released by eight arrivals, one a compute warp;
it is filled by one arrival and its bytes. Warps fetch their own rows of Q. A CTA may compute
several tiles one after another: the ring does not notice where one ends, and each warp goes on to
its next rows when it is done with the present ones.

Keys may come in pages, and be split: then every split of a tile is a tile of its own that leaves
float32 results, and the combine kernel follows.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr, pipeline
from cutlass.cute.nvgpu import cpasync

from ..arguments import ForwardArgs
from ..combine import into_parts, merge
from ..common.kv import KvTile
from ..common.scheduler import SplitScheduler, TileScheduler
from ..common.tma import TmaOperand, rows_first, smem_layout
from ..tiles import TileConfig
from .compute import ComputeRole
from .forward_fp8 import Fp8WarpMma
from .load import LoadRole, PagedLoadRole, PagedOperand
from .products import WarpMma


class ForwardSm120:
    """The forward kernel for one dtype, one tile configuration and the rules of mask and scores."""

    def __init__(self, dtype: type[cutlass.Numeric], cfg: TileConfig, rule, score):
        cfg.check()
        self.dtype, self.cfg, self.rule, self.score = dtype, cfg, rule, score
        self.tile = None  # of keys in pages
        if cfg.box_n is not None:
            shape = (cfg.block_n, cfg.kv_columns, cfg.kv_swizzle_elements, cfg.box_n)
            # The load warp has 24 registers, and products take far longer than issuing copies.
            self.tile = KvTile(dtype, *shape, boxes_unrolled=1, box_by_box=False)

    @cute.jit
    def __call__(self, args: ForwardArgs, stream):
        mK, mV = rows_first(args.mK), rows_first(args.mV)
        num_batch = cute.size(args.mQ, mode=[0])
        if const_expr(args.mCuSeqlensQ is not None):
            num_batch = cute.size(args.mCuSeqlensQ, mode=[0]) - 1
        sizes = (
            Int32(cute.ceil_div(args.max_seqlen_q, self.cfg.block_m)),
            Int32(cute.size(args.mQ, mode=[cute.rank(args.mQ) - 2])),
            Int32(num_batch),
        )
        k_atom, k_tensor = self.tma_load(mK)
        v_atom, v_tensor = self.tma_load(mV)
        tma = ((k_atom, k_tensor), (v_atom, v_tensor))
        if const_expr(args.mWorkspace is None):
            self.launch(args, tma, TileScheduler.of(*sizes), stream)
        else:
            parts = into_parts(args)
            self.launch(parts, tma, SplitScheduler.over(*sizes, args.num_splits), stream)
            merge(args, parts, stream)

    @cute.jit
    def launch(self, args: ForwardArgs, tma, scheduler: TileScheduler, stream):
        self.kernel(args, tma, scheduler).launch(
            grid=[cutlass.min(scheduler.num_tiles(), args.max_ctas), 1, 1],
            block=[self.cfg.num_threads, 1, 1],
            stream=stream,
            min_blocks_per_mp=1,
        )

    def kv_layout(self, stages: int) -> cute.ComposedLayout:
        """(keys, columns, stages) as `ldmatrix` reads it."""
        cfg = self.cfg
        return smem_layout(cfg.block_n, cfg.kv_columns, stages, cfg.kv_swizzle_elements)

    def tma_load(self, mX: cute.Tensor):
        """The copy atom and TMA tensor that load blocks of mX, or boxes of its pages.

        Columns that mX does not have become zero: they add nothing to Q K^T, and those of O are
        not stored.
        """
        if self.tile is not None:
            return self.tile.tma_load(mX)
        layout = cute.slice_(self.kv_layout(1), (None, None, 0))
        block = (self.cfg.block_n, self.cfg.kv_columns)
        return cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), mX, layout, block)

    def operand(self, tma, sKV: cute.Tensor):
        """Where blocks of K or V come from, and where they land."""
        if self.tile is None:
            return TmaOperand(tma[0], tma[1], sKV)
        boxes = cute.make_tensor(sKV.iterator, self.tile.box_layout(self.cfg.kv_stages))
        return PagedOperand(self.tile, tma[0], tma[1], boxes)

    def make_ring(self, barriers: cute.Pointer):
        """The ring of K and V blocks, filled by TMA and emptied by the compute warps."""
        return pipeline.PipelineTmaAsync.create(
            num_stages=self.cfg.kv_stages,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
            consumer_group=pipeline.CooperativeGroup(
                pipeline.Agent.Thread, self.cfg.num_compute_warps
            ),
            tx_count=self.cfg.block_n * self.cfg.kv_columns * self.dtype.width // 8,
            barrier_storage=barriers,
            cta_layout_vmnk=cute.make_layout((1, 1, 1, 1)),
        ).make_participants()

    @cute.kernel
    def kernel(self, args: ForwardArgs, tma, scheduler: TileScheduler):
        cfg = self.cfg
        smem = cutlass.memory.SmemAllocator()
        kv_barriers = smem.allocate_array(cutlass.Int64, 2 * cfg.kv_stages)
        q_shape = (cfg.rows_per_warp, cfg.head_dim, cfg.num_compute_warps)
        q_layout = smem_layout(*q_shape, cfg.swizzle_elements)
        sQ = smem.allocate_tensor(self.dtype, q_layout.outer, 1024, swizzle=q_layout.inner)
        kv_layout = self.kv_layout(cfg.kv_stages)
        sKV = smem.allocate_tensor(self.dtype, kv_layout.outer, 1024, swizzle=kv_layout.inner)
        kv_producer, kv_consumer = self.make_ring(kv_barriers)

        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp >= cfg.num_compute_warps:
            cute.arch.setmaxregister_decrease(cfg.registers.load)
            if warp == cfg.load_warp:
                heads_per_kv_head = scheduler.num_heads.divisor // cute.size(tma[0][1], mode=[2])
                role = LoadRole if self.tile is None else PagedLoadRole
                role(
                    cfg,
                    self.rule,
                    self.operand(tma[0], sKV),
                    self.operand(tma[1], sKV),
                    kv_producer,
                    scheduler,
                    heads_per_kv_head,
                ).run(args)
        else:
            cute.arch.setmaxregister_increase(cfg.registers.compute)
            sVt = cute.make_tensor(sKV.iterator, cute.select(sKV.layout, mode=[1, 0, 2]))
            sVt = cute.local_tile(sVt, (cfg.kv_columns_v, cfg.block_n, cfg.kv_stages), (0, 0, 0))
            guard_v = args.mCuSeqlensK is not None or args.mSeqUsedK is not None
            ComputeRole(
                cfg,
                self.rule,
                self.score,
                self.dtype,
                guard_v,
                sQ[None, None, warp],
                sKV,
                sVt,
                kv_consumer,
                scheduler,
                WarpMma if cfg.kv_bytes == 2 else Fp8WarpMma,
            ).run(args)
