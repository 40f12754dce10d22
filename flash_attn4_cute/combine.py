"""Merges partial attention results over disjoint sets of keys; for every architecture.

With the results O_i and LSE_i of part i, and LSE = log sum_i exp(LSE_i),

    O = sum_i exp(LSE_i - LSE) O_i

(Rabe and Staats 2021, section 2), summed in the order of the parts, so that a result repeats bit
for bit. Four warps share a row, since rows are few and the time is that of a load from memory. A
warp asks for LSE_i of all parts, a part a lane, and for the first of its share of the O_i at the
same time, then for the rest of them up to the last part that has keys.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr

from .common.seqlen import sequence_of
from .common.softmax import LOG2_E
from .decode_arguments import CombineArgs
from .tiles import WARP_SIZE

MAX_PARTS = 256
LOAD_ELEMENTS = 4  # 16 bytes of float32 a lane
WARPS = 4
BATCH = 8  # parts whose loads a lane issues together


@dataclass(frozen=True)
class PartWeights:
    """exp(LSE_i - LSE) of the parts of one row, in shared memory of the warp."""

    sWeights: cute.Tensor
    end: Int32  # no part from here on has keys
    lse: Float32  # without keys the sink, or -inf

    @staticmethod
    @cute.jit
    def of(mLSE: cute.Tensor, sWeights: cute.Tensor, lane: Int32, sink: Any) -> "PartWeights":
        """From the LSE of the parts, MAX_PARTS at most, and a logit without a value, or None."""
        num_parts = cute.size(mLSE)
        slots = MAX_PARTS // WARP_SIZE
        weights = cute.make_rmem_tensor(slots, Float32)
        weights.fill(-Float32.inf)
        largest, end = -Float32.inf, Int32(0)
        for i in cutlass.range_constexpr(slots):
            part = lane + WARP_SIZE * i
            if part < num_parts:
                value = Float32(mLSE[part])
                # +inf is how FlashAttention-2 marks a row without keys.
                value = -Float32.inf if value == Float32.inf else value
                weights[i] = value
                largest = cute.arch.fmax(largest, value)
                end = end if value == -Float32.inf else part + 1
        for step in cutlass.range_constexpr(5):
            largest = cute.arch.fmax(
                largest, cute.arch.shuffle_sync_bfly(largest, offset=1 << step)
            )
            end = cutlass.max(end, cute.arch.shuffle_sync_bfly(end, offset=1 << step))
        has_keys, nothing = largest > -Float32.inf, -Float32.inf
        if const_expr(sink is not None):
            nothing = sink
            largest = cute.arch.fmax(largest, sink) if has_keys else largest
        total = Float32(0.0)
        for i in cutlass.range_constexpr(slots):
            # -inf - -inf is NaN
            lag = 0.0 if largest == -Float32.inf else largest
            weights[i] = cute.math.exp2((weights[i] - lag) * LOG2_E, fastmath=True)
            total += weights[i]
        for step in cutlass.range_constexpr(5):
            total += cute.arch.shuffle_sync_bfly(total, offset=1 << step)
        if const_expr(sink is not None):
            sink_weight = cute.math.exp2((sink - largest) * LOG2_E, fastmath=True)
            total = total + sink_weight if has_keys else total
        inverse = 0.0 if total == 0.0 else 1.0 / total
        for i in cutlass.range_constexpr(slots):
            sWeights[lane + WARP_SIZE * i] = weights[i] * inverse
        cute.arch.sync_warp()
        lse = largest + cute.math.log2(total) / LOG2_E
        return PartWeights(sWeights, end, nothing if total == 0.0 else lse)


class CombineKernel:
    """The merge of results of head dimension `head_dim`, a CTA a row, `vector` elements a load.

    The parts come from the kernel launched just before on the same stream, which lets this one
    start while it ends (programmatic dependent launch).
    """

    def __init__(self, head_dim: int, vector: int = LOAD_ELEMENTS):
        assert head_dim % vector == 0
        self.head_dim, self.vector = head_dim, vector

    @property
    def vectors_per_lane(self) -> int:
        return -(-self.head_dim // (self.vector * WARP_SIZE))

    @cute.jit
    def __call__(self, args: CombineArgs, stream):
        mO = args.mO
        # Packed tokens count once each, whatever bound on a sequence's queries the caller knows.
        num_tokens = Int32(cute.size(mO, mode=[0]))
        if const_expr(cute.rank(mO) == 4):
            num_tokens = args.max_seqlen_q * num_tokens
        self.kernel(args).launch(
            grid=[num_tokens * cute.size(mO, mode=[cute.rank(mO) - 2]), 1, 1],
            block=[WARPS * WARP_SIZE, 1, 1],
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(self, args: CombineArgs):
        # Here and not in __call__: so that the addresses are all that changes in a launch.
        if const_expr(isinstance(args.mOPartial, tuple)):
            outs, lses = pair(*args.mOPartial, self.vector), pair(*args.mLSEPartial, 1)
            args = args._replace(mOPartial=outs, mLSEPartial=lses)
        smem = cutlass.memory.SmemAllocator()
        weights = cute.make_layout((WARPS, MAX_PARTS), stride=(MAX_PARTS, 1))
        sWeights = smem.allocate_tensor(Float32, weights, 16)
        columns = self.vectors_per_lane * WARP_SIZE * self.vector
        totals = cute.make_layout((WARPS, columns), stride=(columns, 1))
        sTotals = smem.allocate_tensor(Float32, totals, 16)
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        index, _, _ = cute.arch.block_idx()
        num_heads = cute.size(args.mO, mode=[cute.rank(args.mO) - 2])
        batch, token, head = Int32(0), index // num_heads, index % num_heads
        if const_expr(cute.rank(args.mO) == 4):
            batch, token = token // args.max_seqlen_q, token % args.max_seqlen_q
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        if self.belongs(args.mCuSeqlensQ, args.mSeqUsedQ, batch, token):
            self.merge_row(args, (batch, token, head), (sWeights[warp, None], sTotals), warp)

    @cute.jit
    def belongs(self, mCuSeqlensQ, mSeqUsedQ, batch: Int32, token: Int32):
        """Whether a token is a query of a sequence; `batch` is that of dense ones."""
        if const_expr(mCuSeqlensQ is None and mSeqUsedQ is None):
            found = True
        elif const_expr(mCuSeqlensQ is None):
            found = token < mSeqUsedQ[batch]
        elif const_expr(mSeqUsedQ is None):
            found = token < mCuSeqlensQ[cute.size(mCuSeqlensQ) - 1]
        else:
            sequence, number = sequence_of(mCuSeqlensQ, token)
            found = sequence >= 0
            if found:
                found = number < mSeqUsedQ[sequence]
        return found

    @cute.jit
    def merge_row(self, args: CombineArgs, place, smem, warp: Int32):
        """One row: `place` is (batch, token in memory, head), `warp` one of those of the CTA."""
        batch, token, head = place
        sWeights, sTotals = smem
        lane = cute.arch.lane_idx()
        if const_expr(cute.rank(args.mO) == 4):
            parts_O = args.mOPartial[None, batch, token, head, None]
            parts_LSE = args.mLSEPartial[None, batch, head, token]
            mO = args.mO[batch, token, head, None]
        else:
            parts_O = args.mOPartial[None, token, head, None]
            parts_LSE = args.mLSEPartial[None, head, token]
            mO = args.mO[token, head, None]
        sink = None
        if const_expr(args.mSink is not None):
            sink = self.load_logit(args.mSink, head)
        # The first parts are on their way while their weights are worked out.
        shape = (self.vector, BATCH, self.vectors_per_lane)
        values = cute.make_rmem_tensor(shape, parts_O.element_type)
        self.load_parts(values, parts_O, warp, cute.size(parts_O, mode=[0]) - 1)
        found = PartWeights.of(parts_LSE, sWeights, lane, sink)
        total = cute.make_rmem_tensor((self.vector, self.vectors_per_lane), Float32)
        total.fill(0.0)
        for first in cutlass.range(warp, found.end, WARPS * BATCH, unroll=1):
            if first != warp:
                self.load_parts(values, parts_O, first, found.end - 1)
            self.add_parts(total, values, found, first)
        self.gather(total, sTotals, warp)
        if warp == 0:
            self.store(total, mO)
            # Two questions: one is answered at trace time, one at run time.
            if const_expr(args.mLSE is not None):  # noqa: SIM102
                if lane == 0:
                    self.store_lse(args.mLSE, place, found.lse)

    @cute.jit
    def load_logit(self, mSink: cute.Tensor, head: Int32) -> Float32:
        return Float32(mSink[head])

    @cute.jit
    def store_lse(self, mLSE: cute.Tensor, place, lse: Float32):
        batch, token, head = place
        if const_expr(cute.rank(mLSE) == 3):
            mLSE[batch, head, token] = lse
        else:
            mLSE[head, token] = lse

    @cute.jit
    def load_parts(self, values: cute.Tensor, parts_O: cute.Tensor, first: Int32, last: Int32):
        """values (elements, BATCH, vectors) of parts first, first + WARPS, ... of one row.

        Parts and columns beyond the last are read as the last: one path, loads issued together.
        """
        lane = cute.arch.lane_idx()
        last_column = self.head_dim // self.vector - 1
        for i in cutlass.range_constexpr(self.vectors_per_lane):
            column = cutlass.min(lane + WARP_SIZE * i, last_column)
            for j in cutlass.range_constexpr(BATCH):
                part = cutlass.min(first + WARPS * j, last)
                source = cute.local_tile(parts_O[part, None], (self.vector,), (column,))
                cute.autovec_copy(source, values[None, j, i])

    @cute.jit
    def add_parts(self, total: cute.Tensor, values: cute.Tensor, found: PartWeights, first: Int32):
        """total (elements, vectors) += weighted `values` of parts first, first + WARPS, ..."""
        for j in cutlass.range_constexpr(BATCH):
            part = first + WARPS * j
            weight = found.sWeights[cutlass.min(part, found.end - 1)]
            weight = weight if part < found.end else 0.0
            # What a part without keys holds may be NaN.
            for i in cutlass.range_constexpr(self.vectors_per_lane):
                for c in cutlass.range_constexpr(self.vector):
                    term = Float32(values[c, j, i]) * weight
                    total[c, i] = total[c, i] + (0.0 if weight == 0.0 else term)

    @cute.jit
    def gather(self, total: cute.Tensor, sTotals: cute.Tensor, warp: Int32):
        """Sum the warps' totals of one row in the order of the warps, for the first warp."""
        lane = cute.arch.lane_idx()
        for i in cutlass.range_constexpr(self.vectors_per_lane):
            place = cute.local_tile(sTotals[warp, None], (self.vector,), (lane + WARP_SIZE * i,))
            cute.autovec_copy(total[None, i], place)
        cute.arch.sync_threads()
        if warp == 0:
            for i in cutlass.range_constexpr(self.vectors_per_lane):
                for w in cutlass.range_constexpr(1, WARPS):
                    other = cute.make_rmem_tensor(self.vector, Float32)
                    place = cute.local_tile(
                        sTotals[w, None], (self.vector,), (lane + WARP_SIZE * i,)
                    )
                    cute.autovec_copy(place, other)
                    for c in cutlass.range_constexpr(self.vector):
                        total[c, i] = total[c, i] + other[c]

    @cute.jit
    def store(self, total: cute.Tensor, mO: cute.Tensor):
        lane = cute.arch.lane_idx()
        for i in cutlass.range_constexpr(self.vectors_per_lane):
            column = lane + WARP_SIZE * i
            if column < self.head_dim // self.vector:
                out = cute.make_rmem_tensor(self.vector, mO.element_type)
                out.store(total[None, i].load().to(mO.element_type))
                target = cute.local_tile(mO, (self.vector,), (column,))
                cute.autovec_copy(out, target)


@cute.jit
def pair(a: cute.Tensor, b: cute.Tensor, vector: int) -> cute.Tensor:
    """Two tensors of the same layout as one of two parts, as far apart as they lie in memory."""
    step = (b.iterator.toint() - a.iterator.toint()) // (a.element_type.width // 8)
    if const_expr(vector > 1):
        step = cute.assume(step, divby=vector)
    layout = cute.make_layout((2, *a.shape), stride=(step, *a.stride))
    return cute.make_tensor(a.iterator, layout)


def merge_of(args: Any, mO: cute.Tensor, mLSE: cute.Tensor) -> CombineArgs:
    """The merge that follows a launch of ForwardArgs or DecodeArgs whose partials are mO, mLSE."""
    return CombineArgs(
        mO,
        mLSE,
        args.mO,
        args.mLSE,
        args.mCuSeqlensQ,
        args.mSeqUsedQ,
        None if args.score is None else args.score.mSink,
        args.max_seqlen_q,
    )


@cute.jit
def partials(args: Any):
    """The workspace of ForwardArgs or DecodeArgs: O (splits, like mO) and LSE, both float32.

    LSE is (splits, b, h, sq) or (splits, h, t).
    """
    shape = args.mO.shape
    lse_shape = (shape[1], shape[0]) if cute.rank(args.mO) == 3 else (shape[0], shape[2], shape[1])
    mO = compact(args.mWorkspace.iterator, (args.num_splits, *shape))
    mLSE = compact(args.mWorkspace.iterator + cute.cosize(mO.layout), (args.num_splits, *lse_shape))
    return mO, mLSE


def compact(pointer: cute.Pointer, shape: tuple) -> cute.Tensor:
    """A row-major tensor whose strides do not overflow 32 bits."""
    strides: list = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, Int64(size) * strides[0])
    return cute.make_tensor(pointer, cute.make_layout(shape, stride=tuple(strides)))


def into_parts(args: Any) -> Any:
    """`args` of a launch whose keys are split, with partial results in place of mO and mLSE."""
    mO, mLSE = partials(args)
    return args._replace(mO=mO, mLSE=mLSE)


@cute.jit
def merge(args: Any, parts: Any, stream):
    """Merge the results of the launch of `parts`, made by `into_parts` of `args`."""
    head_dim_v = cute.size(args.mO, mode=[cute.rank(args.mO) - 1])
    CombineKernel(head_dim_v)(merge_of(args, parts.mO, parts.mLSE), stream)
