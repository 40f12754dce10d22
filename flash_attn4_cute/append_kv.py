"""Appends new keys and values to a cache in place and rotates queries: every card.

    blocks  [0, n)        keys     mKNew --rotate--> mK     at cache_seqlens + t
            [n, 2n)       values   mVNew ----------> mV     at cache_seqlens + t
            [2n, 2n + m)  queries  mQ    --rotate--> mQRotated
            all           lengths  min(cache_seqlens + new tokens, capacity) -> mSeqUsed

Nothing but memory traffic: each thread moves one vector of one head of one token. A token at
position t has its first rotary_dim dimensions rotated in pairs (x, y), in float32:

    x' = x cos_t - y sin_t,    y' = x sin_t + y cos_t

where the pairs are (0, 1), (2, 3), ... if interleaved, else (0, r/2), (1, r/2 + 1), ...
An fp8 cache gets the rotated x / descale, limited to +-448, in one rounding.
Reference: Su et al., "RoFormer", 2021.

Positions, pages and lengths are read from device memory only, so a captured graph replays with
other ones. A sequence with negative cache_seqlens is padding: nothing is written to its cache.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, const_expr

from .append_plan import AppendKey
from .arguments import AppendArgs
from .common.seqlen import sequence_of

THREADS = 256


@dataclass(frozen=True)
class TargetRow:
    """Where one head of a token goes: gX (d,), of the tokens' type, or bytes of scaled fp8."""

    gX: cute.Tensor
    scale: Float32

    @cute.jit
    def move(self, gSource: cute.Tensor, column: Int32, vector: Constexpr[int]):
        """Store vector `column` of a row as it is, or as fp8."""
        if const_expr(self.gX.element_type is cutlass.Uint8):
            self.store(load(gSource, column, vector), column)
        else:
            values = cute.make_rmem_tensor(vector, gSource.element_type)
            copy_vector(cute.local_tile(gSource, (vector,), (column,)), values)
            copy_vector(values, cute.local_tile(self.gX, (vector,), (column,)))

    @cute.jit
    def store(self, values: cute.Tensor, column: Int32):
        """Round float32 values and store them as vector `column`."""
        vector = cute.size(values)
        target = cute.local_tile(self.gX, (vector,), (column,))
        if const_expr(self.gX.element_type is cutlass.Uint8):
            copy_vector(self.as_fp8(values), target)
        else:
            rounded = cute.make_rmem_tensor(vector, self.gX.element_type)
            rounded.store(values.load().to(self.gX.element_type))
            copy_vector(rounded, target)

    @cute.jit
    def as_fp8(self, values: cute.Tensor) -> cute.Tensor:
        """The bytes of scaled values, limited to what e4m3 holds; NaN stays NaN."""
        # Conversions take four values at a time.
        scaled = cute.make_rmem_tensor(max(cute.size(values), 4), Float32)
        for j in cutlass.range_constexpr(cute.size(scaled)):
            scaled[j] = values[min(j, cute.size(values) - 1)] * self.scale
        rounded = cute.make_rmem_tensor(cute.size(scaled), cutlass.Float8E4M3FN)
        rounded.store(scaled.load().to(cutlass.Float8E4M3FN))
        found = cute.recast_tensor(rounded, cutlass.Uint8)
        return cute.make_tensor(found.iterator, cute.make_layout(cute.size(values)))


class AppendKv:
    """The kernel for one AppendKey."""

    def __init__(self, key: AppendKey):
        key.check()
        self.key, self.vector = key, key.vector

    @cute.jit
    def __call__(self, args: AppendArgs, stream):
        new_blocks = self.num_blocks(args.mKNew)
        query_blocks = Int32(0)
        if const_expr(args.mQ is not None):
            query_blocks = self.num_blocks(args.mQ)
        # At least one block: the lengths are due even if no sequence brings a token.
        grid = cutlass.max(2 * new_blocks + query_blocks, 1)
        self.kernel(args, new_blocks).launch(
            grid=[grid, 1, 1], block=[THREADS, 1, 1], stream=stream
        )

    @cute.jit
    def tokens_per_block(self, mX: cute.Tensor) -> Int32:
        """Tokens of mX (.., heads, d) whose vectors fill a block: at least one."""
        vectors = cute.size(mX, mode=[cute.rank(mX) - 2]) * (self.key.head_dim // self.vector)
        return cutlass.max(THREADS // vectors, 1)

    @cute.jit
    def num_tokens(self, mX: cute.Tensor) -> Int32:
        """Tokens of mX (b, s, heads, d) or (total, heads, d)."""
        tokens = Int32(cute.size(mX, mode=[0]))
        if const_expr(cute.rank(mX) == 4):
            tokens = tokens * cute.size(mX, mode=[1])
        return tokens

    @cute.jit
    def num_blocks(self, mX: cute.Tensor) -> Int32:
        """Blocks that move mX."""
        return Int32(cute.ceil_div(self.num_tokens(mX), self.tokens_per_block(mX)))

    @cute.kernel
    def kernel(self, args: AppendArgs, new_blocks: Int32):
        block, _, _ = cute.arch.block_idx()
        self.write_lengths(args, block)
        if block < new_blocks:
            self.append_block(args, block, (args.mKNew, args.mK, args.mKDescale), True)
        elif block < 2 * new_blocks:
            new = (args.mVNew, args.mV, args.mVDescale)
            self.append_block(args, block - new_blocks, new, False)
        else:
            if const_expr(args.mQ is not None):
                self.rotate_block(args, block - 2 * new_blocks)

    @cute.jit
    def write_lengths(self, args: AppendArgs, block: Int32):
        """Tokens in the cache after the update; 0 for padding sequences."""
        thread, _, _ = cute.arch.thread_idx()
        blocks, _, _ = cute.arch.grid_dim()
        batch = block * THREADS + thread
        while batch < cute.size(args.mSeqUsed):
            if const_expr(args.mCuSeqlensNew is not None):
                count = args.mCuSeqlensNew[batch + 1] - args.mCuSeqlensNew[batch]
            else:
                count = Int32(cute.size(args.mKNew, mode=[1]))
            before = args.mCacheSeqlens[batch]
            # Tokens past the capacity are dropped, and no key is read there.
            after = cutlass.min(before + count, args.capacity)
            if before < 0:
                after = Int32(0)
            args.mSeqUsed[batch] = after
            batch += blocks * THREADS

    @cute.jit
    def append_block(
        self,
        args: AppendArgs,
        block: Int32,
        tensors: tuple,
        are_keys: Constexpr[bool],
    ):
        """Move this block's tokens to the cache: tensors is (new tokens, cache, descale)."""
        mNew, mCache, mDescale = tensors
        vectors = cute.size(mNew, mode=[cute.rank(mNew) - 1]) // self.vector
        per_token = Int32(cute.size(mNew, mode=[cute.rank(mNew) - 2])) * vectors
        per_block = self.tokens_per_block(args.mKNew)
        first, num_tokens = block * per_block, self.num_tokens(mNew)
        i, _, _ = cute.arch.thread_idx()
        while i < per_block * per_token:
            token, head, column = first + i // per_token, i % per_token // vectors, i % vectors
            if token < num_tokens:
                batch, index = self.locate(args.mCuSeqlensNew, mNew, token)
                start = Int32(-1)
                if batch >= 0:
                    start = args.mCacheSeqlens[batch]
                position = start + index
                # Past the capacity lies memory of others; on a GPU nobody has read the lengths.
                if start >= 0 and position < args.capacity:
                    gTarget = self.cache_row(args, mCache, batch, position, head)
                    gSource = token_row(mNew, batch, index, token, head)
                    scale = Float32(1.0)
                    if const_expr(mDescale is not None):
                        scale = Float32(1.0) / mDescale[batch, head]
                    row = TargetRow(gTarget, scale)
                    if const_expr(are_keys):
                        self.move_rotated(args, gSource, row, column, position)
                    else:
                        row.move(gSource, column, self.vector)
            i += THREADS

    @cute.jit
    def rotate_block(self, args: AppendArgs, block: Int32):
        """Write this block's tokens of mQ, rotated, to mQRotated."""
        mQ = args.mQ
        vectors = self.key.head_dim // self.vector
        per_token = Int32(cute.size(mQ, mode=[cute.rank(mQ) - 2])) * vectors
        per_block = self.tokens_per_block(mQ)
        first, num_tokens = block * per_block, self.num_tokens(mQ)
        i, _, _ = cute.arch.thread_idx()
        while i < per_block * per_token:
            token, head, column = first + i // per_token, i % per_token // vectors, i % vectors
            if token < num_tokens:
                batch, index = self.locate(args.mCuSeqlensQ, mQ, token)
                if batch >= 0:
                    gSource = token_row(mQ, batch, index, token, head)
                    gTarget = token_row(args.mQRotated, batch, index, token, head)
                    row = TargetRow(gTarget, Float32(1.0))
                    start = args.mCacheSeqlens[batch]
                    if start >= 0:
                        position = start + args.query_step * index
                        self.move_rotated(args, gSource, row, column, position)
                    else:
                        row.move(gSource, column, self.vector)
            i += THREADS

    @cute.jit
    def locate(self, mCuSeqlens, mX: cute.Tensor, token: Int32):
        """(sequence, number in it) of a token of mX; (-1, .) for one that no sequence holds."""
        if const_expr(mCuSeqlens is None):
            length = Int32(cute.size(mX, mode=[1]))
            batch, index = token // length, token % length
        else:
            batch, index = sequence_of(mCuSeqlens, token)
        return batch, index

    @cute.jit
    def cache_row(
        self, args: AppendArgs, mCache: cute.Tensor, batch: Int32, position: Int32, head: Int32
    ) -> cute.Tensor:
        """(d,): where the cache keeps one head of the token at `position` of a sequence."""
        row, slot = batch, position
        if const_expr(args.mPageTable is not None):
            page_size = Int32(cute.size(mCache, mode=[1]))
            row, slot = args.mPageTable[batch, position // page_size], position % page_size
        elif const_expr(args.mBatchIdx is not None):
            row = args.mBatchIdx[batch]
        return mCache[row, slot, head, None]

    @cute.jit
    def move_rotated(
        self,
        args: AppendArgs,
        gSource: cute.Tensor,
        row: "TargetRow",
        column: Int32,
        position: Int32,
    ):
        """Move vector `column` of a row, rotated to `position` if it is one of those that turn."""
        if const_expr(args.mCos is None):
            row.move(gSource, column, self.vector)
        else:
            if column < self.key.rotary_dim // self.vector:
                gCos, gSin = args.mCos[position, None], args.mSin[position, None]
                if const_expr(self.key.interleaved and self.vector > 1):
                    turned = self.turned_within(gSource, gCos, gSin, column)
                else:
                    turned = self.turned_across(gSource, gCos, gSin, column)
                row.store(turned, column)
            else:
                row.move(gSource, column, self.vector)

    @cute.jit
    def turned_within(
        self, gSource: cute.Tensor, gCos: cute.Tensor, gSin: cute.Tensor, column: Int32
    ) -> cute.Tensor:
        """One vector of interleaved pairs, rotated, in float32."""
        half = self.vector // 2
        x = load(gSource, column, self.vector)
        cos, sin = load(gCos, column, half), load(gSin, column, half)
        turned = cute.make_rmem_tensor(self.vector, Float32)
        for j in cutlass.range_constexpr(half):
            turned[2 * j] = x[2 * j] * cos[j] - x[2 * j + 1] * sin[j]
            turned[2 * j + 1] = x[2 * j] * sin[j] + x[2 * j + 1] * cos[j]
        return turned

    @cute.jit
    def turned_across(
        self, gSource: cute.Tensor, gCos: cute.Tensor, gSin: cute.Tensor, column: Int32
    ) -> cute.Tensor:
        """One vector, rotated with the one that holds the other halves of its pairs, in float32."""
        pairs = self.key.rotary_dim // 2 // self.vector  # vectors of pairs in a row of the tables
        if const_expr(self.key.interleaved):
            is_first, pair, partner = column % 2 == 0, column // 2, column ^ 1
        else:
            is_first, pair = column < pairs, column % pairs
            partner = (column + pairs) % (2 * pairs)
        x, y = load(gSource, column, self.vector), load(gSource, partner, self.vector)
        cos, sin = load(gCos, pair, self.vector), load(gSin, pair, self.vector)
        sign = Float32(-1.0) if is_first else Float32(1.0)
        turned = cute.make_rmem_tensor(self.vector, Float32)
        for j in cutlass.range_constexpr(self.vector):
            turned[j] = x[j] * cos[j] + sign * (y[j] * sin[j])
        return turned


def token_row(
    mX: cute.Tensor, batch: Int32, index: Int32, token: Int32, head: Int32
) -> cute.Tensor:
    """(d,): one head of a token of mX (b, s, heads, d) or (total, heads, d)."""
    place = (batch, index) if cute.rank(mX) == 4 else (token,)
    return mX[(*place, head, None)]


@cute.jit
def load(gX: cute.Tensor, column: Int32, vector: Constexpr[int]) -> cute.Tensor:
    """Vector `column` of a row, in float32."""
    values = cute.make_rmem_tensor(vector, gX.element_type)
    copy_vector(cute.local_tile(gX, (vector,), (column,)), values)
    wide = cute.make_rmem_tensor(vector, Float32)
    wide.store(values.load().to(Float32))
    return wide


@cute.jit
def copy_vector(source: cute.Tensor, target: cute.Tensor):
    """Copy a vector with one instruction, or an element where rows are not aligned."""
    if const_expr(cute.size(source) == 1):
        target[0] = source[0]
    else:
        cute.autovec_copy(source, target)
