"""Gradients of attention, recomputing the probabilities tile by tile from the saved log-sum-exp.

With P = exp(S - lse), the dropout multiplier D, and row sums delta_i = dout_i . out_i - dlse_i:

    dV = (P * D)^T dout          dP = (dout V^T) * D          dS = P * (dP - delta)
    dQ = scale * dS K            dK = scale * dS^T Q
    dsink = -sum_i exp(sink - lse_i) delta_i

(Dao et al., "FlashAttention", 2022, appendix B.2; dlse because the log-sum-exp is an output too.
Rows that see no key have lse = sink: of them, dsink gets dlse.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..flash_attn4_cute.problem import AttentionProblem, AttentionTensors
from .dropout import Dropout, make_dropout
from .forward import dot_keys, key_tiles, multiply, query_tiles, weigh_values
from .groups import Group, make_groups
from .scores import ScoreRule, Tile


def backward(
    problem: AttentionProblem, tensors: AttentionTensors, dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, dsink) in the dtypes of q, k, v and the sink.

    Args:
        tensors: those of the forward call with its results, out and lse.
        dout: gradient of out.
        dlse: gradient of lse, or None for 0.
    """
    q, k, v, sink = tensors.q, tensors.k, tensors.v, tensors.sink
    gradients = _Gradients(q, k, v, sink)
    rule = ScoreRule.of(problem, tensors)
    dropout = make_dropout(problem.dropout_p, tensors.dropout_state, problem.num_heads)
    for group in make_groups(problem, tensors):
        for sub, rows in query_tiles(group, problem.num_heads):
            row = _Rows(tensors, sub, rows, rule.scale, dout, dlse)
            dq = torch.zeros_like(row.queries)
            for cols in key_tiles(rule.visible_keys(sub, rows)):
                dq += _tile_gradients(row, Tile(sub, rows, cols), rule, dropout, gradients)
            sub.queries(gradients.dq, rows.start, rows.stop).copy_(dq.mul_(rule.scale))
            if gradients.dsink is not None:
                gradients.dsink -= row.sink_share(sink).mul_(row.delta).sum(dim=(0, 2))
    return gradients.result()


class _Gradients:
    """Accumulators: dq is written once per row, the others are sums and therefore float32."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None):
        self.like = (k, v, sink)
        self.k, self.v = k, v
        self.dq = torch.zeros_like(q)
        self.dk = torch.zeros_like(k, dtype=torch.float32)
        self.dv = torch.zeros_like(v, dtype=torch.float32)
        self.dsink = None if sink is None else torch.zeros_like(sink, dtype=torch.float32)

    def result(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        k, v, sink = self.like
        dsink = None if self.dsink is None or sink is None else self.dsink.to(sink.dtype)
        return self.dq, self.dk.to(k.dtype), self.dv.to(v.dtype), dsink


class _Rows:
    """What belongs to one tile of queries, in float32."""

    def __init__(
        self,
        tensors: AttentionTensors,
        group: Group,
        rows: range,
        scale: float,
        dout: Tensor,
        dlse: Tensor | None,
    ):
        span = (rows.start, rows.stop)
        assert tensors.out is not None and tensors.lse is not None
        self.queries = group.queries(tensors.q, *span).to(torch.float32) * scale
        self.dout = group.queries(dout, *span).to(torch.float32)
        self.delta = (self.dout * group.queries(tensors.out, *span)).sum(dim=-1)
        if dlse is not None:
            self.delta -= group.statistics(dlse, *span)
        lse = group.statistics(tensors.lse, *span)
        # Rows with neither key nor sink have lse = -inf; +inf makes probabilities exp(-inf) = 0.
        self.lse = lse.masked_fill(lse == -torch.inf, torch.inf)

    def sink_share(self, sink: Tensor | None) -> Tensor:
        """Probability (count, h, rows) of the sink."""
        assert sink is not None
        return torch.exp(sink.to(torch.float32)[:, None] - self.lse)


def _tile_gradients(
    row: _Rows, tile: Tile, rule: ScoreRule, dropout: Dropout | None, gradients: _Gradients
) -> Tensor:
    """Add a tile's part to dk and dv; return its part of dq / scale."""
    group, span = tile.group, (tile.cols.start, tile.cols.stop)
    keys = group.keys(gradients.k, *span).to(torch.float32)
    values = group.keys(gradients.v, *span).to(torch.float32)
    z = dot_keys(row.queries, keys)
    slope = rule.slope(z)
    p = rule.apply(z, tile).sub_(row.lse.unsqueeze(-1)).exp_()
    dp = dot_keys(row.dout, values)
    if dropout is None:
        dropped = p
    else:
        multiplier = dropout.multiplier(tile)
        dropped = p * multiplier
        dp *= multiplier
    group.add_keys(gradients.dv, *span, _sum_queries(dropped, row.dout, values.shape[1]))
    ds = dp.sub_(row.delta.unsqueeze(-1)).mul_(p)
    if slope is not None:
        ds *= slope
    group.add_keys(gradients.dk, *span, _sum_queries(ds, row.queries, keys.shape[1]))
    return weigh_values(ds, keys)


def _sum_queries(weights: Tensor, rows: Tensor, num_heads_kv: int) -> Tensor:
    """weights^T rows, summed over the query heads of each key head: (n, h_k, cols, d)."""
    n, h, r, cols = weights.shape
    stacked = (n, num_heads_kv, h // num_heads_kv * r)
    transposed = weights.reshape(*stacked, cols).transpose(-1, -2)
    return multiply(transposed, rows.reshape(*stacked, rows.shape[-1]))
