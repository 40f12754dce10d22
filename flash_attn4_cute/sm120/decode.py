"""Decode attention for mma.sync GPUs: few query rows against many keys.

                 kv_ring (K, V, K, V ...)
    LoadRole  ---------------------------->  ComputeRole x 4 warps  --->  WarpMerge  --->  O, LSE
    (1 thread)                                a quarter of each block      once
              <----------------------------
                 slots freed, 4 arrivals

Decoding is bound by the bytes of K and V, so one CTA holds all query heads that share a key head
(packed GQA) and streams its share of the keys once, with the whole of shared memory in flight. Each
compute warp takes its own quarter of the keys of every block against all rows, Q in registers, so
every byte is also read only once from shared memory. Where there are fewer (sequence, key head)
pairs than the card has room for, keys are split among CTAs (FlashDecoding) and `combine` merges.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr, pipeline
from cutlass.cute.nvgpu import cpasync

from ..combine import into_parts, merge
from ..common.descale import scale_and_factor
from ..common.fragments import rows_and_columns
from ..common.kv import DenseKv, KvTile, PagedKv
from ..common.softmax import OnlineSoftmax
from ..common.tma import rows_first
from ..decode_arguments import DecodeArgs
from ..decode_tiles import STAGING_PAD, DecodeConfig
from .decode_compute import DecodeComputeRole, SliceMma
from .decode_fp8 import Fp8SliceMma
from .decode_load import DecodeLoadRole
from .decode_merge import WarpMerge
from .decode_work import DecodeGrid, DecodeWork


class DecodeSm120:
    """The decode kernel for one dtype, one tile configuration and one mask rule.

    `score` is the ScoreRule. `box_n` is None unless K and V come in pages: then a page is a
    multiple of so many rows.
    """

    def __init__(
        self,
        dtype: type[cutlass.Numeric],
        cfg: DecodeConfig,
        rule: Any,
        score: Any,
        box_n: int | None,
    ):
        cfg.check()
        self.dtype, self.cfg, self.rule, self.score = dtype, cfg, rule, score
        self.tile = KvTile(
            dtype, cfg.block_n, cfg.kv_columns, cfg.swizzle_elements, box_n or cfg.block_n
        )

    @cute.jit
    def __call__(self, args: DecodeArgs, stream):
        mQ = args.mQ
        heads = cute.size(mQ, mode=[cute.rank(mQ) - 2])
        heads_kv = cute.size(args.mK, mode=[cute.rank(args.mK) - 2])
        num_batch = cute.size(mQ, mode=[0])
        if const_expr(args.mCuSeqlensQ is not None):
            num_batch = cute.size(args.mCuSeqlensQ, mode=[0]) - 1
        num_rows = args.max_seqlen_q * (heads // heads_kv)
        grid = DecodeGrid(
            Int32(cute.ceil_div(num_rows, self.cfg.rows)),
            Int32(heads_kv),
            args.num_splits,
            Int32(num_batch),
        )
        tma = tuple(self.tile.fitted(mX).tma_load(mX) for mX in map(rows_first, (args.mK, args.mV)))
        if const_expr(args.mWorkspace is None):
            self.launch(args, tma, grid, stream)
        else:
            parts = into_parts(args)
            self.launch(parts, tma, grid, stream)
            merge(args, parts, stream)

    @cute.jit
    def launch(self, args: DecodeArgs, tma, grid: DecodeGrid, stream):
        self.kernel(args, ((tma[0][0], tma[0][1]), (tma[1][0], tma[1][1])), grid).launch(
            grid=grid.shape(),
            block=[self.cfg.num_threads, 1, 1],
            stream=stream,
            min_blocks_per_mp=self.cfg.ctas_per_sm,
            use_pdl=True,
            preferred_smem_carveout=100,  # percent; named, or CuTe DSL would ask a device
        )

    def make_ring(self, barriers: cute.Pointer):
        """The ring of K and V blocks, filled by TMA and emptied by the compute warps."""
        cfg = self.cfg
        return pipeline.PipelineTmaAsync.create(
            num_stages=cfg.kv_stages,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
            consumer_group=pipeline.CooperativeGroup(
                pipeline.Agent.Thread, cfg.num_compute_warps
            ),
            tx_count=cfg.ring_bytes // cfg.kv_stages,
            barrier_storage=barriers,
            cta_layout_vmnk=cute.make_layout((1, 1, 1, 1)),
        ).make_participants()  # fmt: skip

    @cute.kernel
    def kernel(self, args: DecodeArgs, tma, grid: DecodeGrid):
        cfg, tile = self.cfg, self.tile
        smem = cutlass.memory.SmemAllocator()
        barriers = smem.allocate_array(cutlass.Int64, 2 * cfg.kv_stages)
        stats = cute.make_layout((cfg.num_compute_warps, cfg.rows), stride=(cfg.rows, 1))
        sMax = smem.allocate_tensor(Float32, stats, 16)
        sSum = smem.allocate_tensor(Float32, stats, 16)
        sKV = smem.allocate_tensor(
            self.dtype, tile.layout(cfg.kv_stages), 1024, swizzle=tile.swizzle
        )
        producer, consumer = self.make_ring(barriers)
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == cfg.load_warp:
            for operand in tma:
                cpasync.prefetch_descriptor(operand[0])
        # What comes before on the stream has written the lengths, the cache and the queries.
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        work = DecodeWork.of(cfg, self.rule, args, grid)
        if warp == cfg.load_warp:
            boxes = cute.make_tensor(sKV.iterator, tile.box_layout(cfg.kv_stages))
            k, v = (
                self.source(args, self.tile.fitted(rows_first(mX)), operand, boxes, work)
                for mX, operand in ((args.mK, tma[0]), (args.mV, tma[1]))
            )
            DecodeLoadRole(k, v, producer, work).run()
        else:
            guard_v = args.mCuSeqlensK is not None or args.mSeqUsedK is not None
            products = Fp8SliceMma if cfg.kv_bytes == 1 else SliceMma
            mma = products(cfg, self.dtype, cute.arch.lane_idx())
            acc_O = mma.accumulator(cfg.head_dim)
            num_rows = cute.size(rows_and_columns(acc_O), mode=[0])
            place = (work.batch, work.kv_head)
            scale, factor = scale_and_factor(args, self.score.scaled, place)
            softmax = OnlineSoftmax.start(scale, num_rows)
            DecodeComputeRole(
                cfg, self.rule, self.score, self.dtype, guard_v, mma, factor, sKV, consumer, work
            ).run(args, acc_O, softmax)
            staged = cute.make_tensor(
                cute.recast_ptr(sKV.iterator, dtype=Float32), self.staging_layout()
            )
            WarpMerge(cfg, staged, sMax, sSum, work).run(args, acc_O, softmax)

    def staging_layout(self) -> cute.Layout:
        """(warps, rows, d) of float32, rows padded."""
        cfg = self.cfg
        row = cfg.head_dim + STAGING_PAD
        return cute.make_layout(
            (cfg.num_compute_warps, cfg.rows, cfg.head_dim), stride=(cfg.rows * row, row, 1)
        )

    def source(self, args: DecodeArgs, tile: KvTile, tma, boxes: cute.Tensor, work: DecodeWork):
        """Where blocks of K or V come from."""
        seqlen = work.seqlen
        if args.mPageTable is not None:
            where, mPages = (work.kv_head, seqlen.seqlen_k), args.mPageTable[work.batch, None]
            return PagedKv.of(tile, tma, boxes, where, mPages, policy=work.policy())
        where = (work.kv_head, seqlen.batch_k, seqlen.offset_k)
        return DenseKv.of(tile, tma, boxes, where, policy=work.policy())
