"""Forward attention in tiles: memory stays bounded whatever the sequence lengths.

For each tile of queries, keys stream past in tiles and the softmax is kept up to date
(Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et al.,
"FlashAttention", 2022, algorithm 1). All arithmetic is float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..flash_attn4_cute.problem import AttentionProblem, AttentionTensors
from ..merge import combine
from .dropout import Dropout, make_dropout
from .groups import Group, make_groups
from .scores import ScoreRule, Tile

# A tile of scores has about this many elements: 1 MiB in float32, so that it stays in an L2 cache.
_TILE_ELEMENTS = 1 << 18
_TILE_KEYS = 512


@torch.no_grad()
def forward(problem: AttentionProblem, tensors: AttentionTensors) -> None:
    """Write tensors.out and, unless it is None, tensors.lse.

    Rows that see no key get out = 0 and lse = sink, or -inf without a sink; rows outside every
    sequence are not written.
    """
    q, out, lse = tensors.q, tensors.out, tensors.lse
    assert out is not None
    rule = ScoreRule.of(problem, tensors)
    dropout = make_dropout(problem.dropout_p, tensors.dropout_state, problem.num_heads)
    for group in make_groups(problem, tensors):
        for sub, rows in query_tiles(group, problem.num_heads):
            queries = sub.queries(q, rows.start, rows.stop).to(torch.float32) * rule.scale
            if tensors.k_descale is not None:
                queries *= sub.per_query_head(tensors.k_descale, problem.num_heads)
            attention = RowsAttention(rule, dropout, sub, rows, queries)
            o, log_sum = attention.run(tensors.k, tensors.v, max(1, problem.num_splits))
            if tensors.v_descale is not None:
                o *= sub.per_query_head(tensors.v_descale, problem.num_heads)
            if tensors.sink is not None:
                o, log_sum = add_sink(o, log_sum, tensors.sink)
            sub.queries(out, rows.start, rows.stop).copy_(o)
            if lse is not None:
                sub.statistics(lse, rows.start, rows.stop).copy_(log_sum)


def explain(problem: AttentionProblem) -> str:
    """How `forward` cuts this problem."""
    longest = Group(
        first=0, count=problem.batch, seqlen_q=problem.seqlen_q, seqlen_k=problem.seqlen_k
    )
    rows = next(iter(query_tiles(longest, problem.num_heads)))[1] if problem.seqlen_q else range(0)
    return (
        f"online softmax in float32: up to {len(rows)} queries x {_TILE_KEYS} keys a tile, "
        f"{max(1, problem.num_splits)} split(s), {problem.kv_layout.value} keys, {problem.mask}"
    )


def query_tiles(group: Group, num_heads: int) -> Iterator[tuple[Group, range]]:
    """Cut a group into sets of sequences and ranges of queries whose tiles of scores fit."""
    keys = max(1, min(group.seqlen_k, _TILE_KEYS))
    per_sequence = num_heads * min(group.seqlen_q, 64) * keys
    count = max(1, min(group.count, _TILE_ELEMENTS // per_sequence))
    step = max(16, _TILE_ELEMENTS // (count * num_heads * keys))
    for first in range(0, group.count, count):
        sub = group.part(first, min(count, group.count - first))
        for start in range(0, group.seqlen_q, step):
            yield sub, range(start, min(start + step, group.seqlen_q))


def key_tiles(keys: range) -> Iterator[range]:
    """Cut a range of keys into tiles."""
    for start in range(keys.start, keys.stop, _TILE_KEYS):
        yield range(start, min(start + _TILE_KEYS, keys.stop))


class RowsAttention:
    """Attention of one tile of queries, already scaled, over any range of keys."""

    def __init__(
        self, rule: ScoreRule, dropout: Dropout | None, group: Group, rows: range, queries: Tensor
    ):
        self.rule, self.dropout, self.group, self.rows = rule, dropout, group, rows
        self.queries = queries

    def run(self, k: Tensor, v: Tensor, num_splits: int) -> tuple[Tensor, Tensor]:
        """(out (count, h, rows, d_v), lse (count, h, rows)), by way of `num_splits` partials."""
        seen = self.rule.visible_keys(self.group, self.rows)
        if num_splits == 1:
            return self.over(k, v, seen)
        size = -(-self.group.seqlen_k // num_splits)
        parts = [
            self.over(k, v, range(max(seen.start, i * size), min(seen.stop, (i + 1) * size)))
            for i in range(num_splits)
        ]
        out, lse = zip(*parts, strict=True)
        return combine(torch.stack(out), torch.stack(lse))

    def over(self, k: Tensor, v: Tensor, keys: range) -> tuple[Tensor, Tensor]:
        """(out, lse) over these keys only."""
        softmax = OnlineSoftmax((*self.queries.shape[:-1], v.shape[-1]))
        for cols in key_tiles(keys):
            tile = Tile(self.group, self.rows, cols)
            z = dot_keys(self.queries, self.group.keys(k, cols.start, cols.stop))
            scores = self.rule.apply(z, tile)
            multiplier = None if self.dropout is None else self.dropout.multiplier(tile)
            softmax.update(scores, self.group.keys(v, cols.start, cols.stop), multiplier)
        return softmax.result()


class OnlineSoftmax:
    """softmax(s) v over columns that arrive tile by tile.

    Keeps, per row, the maximum m, norm = sum_j exp(s_j - m) and o = sum_j exp(s_j - m) v_j.
    """

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape
        self.m: Tensor | None = None
        self.norm: Tensor | None = None
        self.o: Tensor | None = None

    def update(self, scores: Tensor, values: Tensor, multiplier: Tensor | None) -> None:
        """Take in more columns; overwrites `scores`. `multiplier` applies to o but not to norm."""
        m = scores.amax(dim=-1, keepdim=True)
        if self.m is not None:
            m = torch.maximum(m, self.m)
        # A row that has seen only -inf keeps norm = 0 and o = 0: subtract 0 there, not -inf.
        base = m.masked_fill(m == -torch.inf, 0.0)
        p = scores.sub_(base).exp_()
        norm = p.sum(dim=-1, keepdim=True)
        o = weigh_values(p if multiplier is None else p.mul_(multiplier), values)
        if self.m is not None and self.norm is not None and self.o is not None:
            # norm <- norm * exp(m_old - m) + sum_j exp(s_j - m), and the same for o
            decay = self.m.sub_(base).exp_()
            norm.addcmul_(self.norm, decay)
            o.addcmul_(self.o, decay)
        self.m, self.norm, self.o = m, norm, o

    def result(self) -> tuple[Tensor, Tensor]:
        """(o / norm, m + log norm); 0 and -inf for rows without a visible key."""
        if self.m is None or self.norm is None or self.o is None:
            out = torch.zeros(self.shape, dtype=torch.float32, device="cpu")
            return out, torch.full_like(out[..., 0], -torch.inf)
        lse = (self.m + self.norm.log()).squeeze(-1)
        return self.o / self.norm.masked_fill(self.norm == 0.0, 1.0), lse


def dot_keys(queries: Tensor, keys: Tensor) -> Tensor:
    """q k^T per head: (n, h, rows, d) and (n, h_k, cols, d) -> (n, h, rows, cols).

    Query heads that share a key head are stacked as rows, so that keys are never repeated.
    """
    n, h, rows, d = queries.shape
    h_k, cols = keys.shape[1:3]
    stacked = queries.reshape(n, h_k, h // h_k * rows, d)
    return multiply(stacked, keys.to(queries.dtype).transpose(-1, -2)).view(n, h, rows, cols)


def weigh_values(p: Tensor, values: Tensor) -> Tensor:
    """p v per head: (n, h, rows, cols) and (n, h_k, cols, d_v) -> (n, h, rows, d_v)."""
    n, h, rows, cols = p.shape
    h_k, d_v = values.shape[1], values.shape[3]
    stacked = p.reshape(n, h_k, h // h_k * rows, cols)
    return multiply(stacked, values.to(p.dtype)).view(n, h, rows, d_v)


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a b for 4-D tensors, sequence by sequence: torch.matmul would copy strided keys first."""
    product = a.new_empty(*a.shape[:3], b.shape[3])
    for i in range(a.shape[0]):
        torch.bmm(a[i], b[i], out=product[i])
    return product


def add_sink(out: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """Let a logit without a value take part in each softmax.

    out <- out * exp(lse - lse'), lse' = log(exp(lse) + exp(sink)); rows without keys: 0 and sink.
    """
    total = torch.logaddexp(lse, sink.to(torch.float32)[:, None])
    # -inf - -inf is NaN
    share = torch.exp(lse - total).masked_fill_(lse == -torch.inf, 0.0)
    return out * share.unsqueeze(-1), total
