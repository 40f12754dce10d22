"""What attention means: plain formulas, one sequence and one head at a time.

For query i of a sequence with sq queries and sk keys, head h, and p = i + sk - sq (the mask is
aligned to the bottom right):

    visible(i, j)  =  p - left <= j <= p + right   and   mask_mod(b, h, i, j)
    x(i, j)        =  softmax_scale * q_i . k_j
    x              <- softcap * tanh(x / softcap)
    x              <- score_mod(x, b, h, i, j)
    s(i, j)        =  x(i, j) - slope_h * |p - j|
    LSE(i)         =  log(sum over visible j of exp(s(i, j))  +  exp(sink_h))
    out(i)         =  sum over visible j of exp(s(i, j) - LSE(i)) * dropout(i, j) * v_j

A sum without terms is 0: a row that sees no key has out = 0, and LSE = sink_h, or -inf without a
sink. Key head of query head h: h // (h_q / h_k).

The same formulas serve at three precisions: EXACT (float64, the truth), NAIVE (every step rounded
to the input dtype) and MIXED (scores in float32, weights in the input dtype, as every flash kernel
does it). The last two are what tolerances are multiples of. Everything is differentiable, so
gradients are autograd's. Shares nothing with the kernels or the cpu variant.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from . import philox

MAX_SCORES = (
    1 << 25
)  # elements of one score matrix held at a time; longer queries are taken in pieces


@dataclass(frozen=True)
class Precision:
    """dtypes of the score matrix, the softmax weights and the output; None = the inputs' dtype."""

    scores: torch.dtype | None
    weights: torch.dtype | None
    out: torch.dtype | None


EXACT = Precision(torch.float64, torch.float64, torch.float64)
NAIVE = Precision(None, None, None)
MIXED = Precision(torch.float32, None, None)


@dataclass(frozen=True)
class Dropout:
    """Each weight is dropped with probability p, by the mask that philox.py documents."""

    p: float
    seed: int
    offset: int


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What a call says beside q, k, v. A bound of window that is None or negative is unbounded."""

    causal: bool = False
    window: tuple[int | None, int | None] | None = (None, None)
    softmax_scale: float | None = None
    softcap: float = 0.0
    sink: Tensor | None = None  # (h,)
    alibi_slopes: Tensor | None = None  # (h,) or (b, h)
    score_mod: Callable | None = None
    mask_mod: Callable | None = None
    aux_tensors: Sequence[Tensor] | None = None
    dropout: Dropout | None = None

    def bounds(self) -> tuple[float, float]:
        """(left, right), infinite where unbounded. causal is right = 0 whatever the window says."""
        left, right = self.window if self.window is not None else (None, None)
        left = math.inf if left is None or left < 0 else left
        right = math.inf if right is None or right < 0 else right
        return left, 0 if self.causal else right


@dataclass(frozen=True)
class Result:
    """One sequence: out (sq, h, d_v), lse (h, sq), and of the sums behind out (sq, h, d_v):
    magnitude, of weights * |v|; reach, what it is if every weight above 0 were 1 before dropout.
    """

    out: Tensor
    lse: Tensor
    magnitude: Tensor
    reach: Tensor


# --- one head of one sequence ---------------------------------------------------------------------


def visible_keys(rule: Rule, rows: Tensor, sq: int, sk: int, where: tuple[int, int]) -> Tensor:
    """(len(rows), sk) bool: who sees what. Only mask_mod looks at where = (batch, head)."""
    i, j = rows[:, None], torch.arange(sk, device=rows.device)[None, :]
    left, right = rule.bounds()
    position = i + sk - sq
    visible = (j >= position - left) & (j <= position + right)
    if rule.mask_mod is not None:
        visible = visible & call_mod(rule.mask_mod, (), where, i, j, (sq, sk), rule.aux_tensors)
    return visible


def call_mod(mod, first, where, i, j, lengths, aux):  # noqa: PLR0913 - mirrors the user's callable
    """mod(*first, batch, head, i, j, seqlen_info, aux_tensors), broadcast over all (i, j)."""
    batch, head = (torch.full_like(i, w) for w in where)
    info = SimpleNamespace(seqlen_q=lengths[0], seqlen_k=lengths[1])
    return mod(*first, batch, head, i, j, info, aux)


def scores(
    q: Tensor, k: Tensor, rule: Rule, rows: Tensor, sq: int, where: tuple[int, int]
) -> Tensor:
    """(len(rows), sk): s of the formulas, -inf where not visible. q: these rows; k: all keys."""
    sk = k.shape[0]
    batch, head = where
    scale = rule.softmax_scale if rule.softmax_scale is not None else 1.0 / math.sqrt(q.shape[-1])
    x = (q @ k.T) * scale
    i, j = rows[:, None], torch.arange(sk, device=rows.device)[None, :]
    if rule.softcap:
        x = rule.softcap * torch.tanh(x / rule.softcap)
    if rule.score_mod is not None:
        x = call_mod(rule.score_mod, (x,), where, i, j, (sq, sk), rule.aux_tensors)
    if rule.alibi_slopes is not None:
        slopes = rule.alibi_slopes if rule.alibi_slopes.ndim == 1 else rule.alibi_slopes[batch]
        x = x - slopes[head].to(x.dtype) * (i + sk - sq - j).abs()
    return x.masked_fill(~visible_keys(rule, rows, sq, sk, where), -math.inf)


def weigh(s: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax weights of the rows of s and their log-sum-exp, to both of which the sink belongs."""
    peak = s.amax(1) if s.shape[1] else s.new_full((s.shape[0],), -math.inf)
    if sink is not None:
        peak = torch.maximum(peak, sink.to(s.dtype))
    peak = torch.where(peak.isinf(), 0.0, peak).detach()
    e = torch.exp(s - peak[:, None])
    total = e.sum(1)
    if sink is not None:
        total = total + torch.exp(sink.to(s.dtype) - peak)
    nothing = total == 0
    total = torch.where(nothing, 1.0, total)
    return e / total[:, None], torch.where(nothing, -math.inf, peak + torch.log(total))


def attend_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: Rule,
    where: tuple[int, int],
    heads: int,
    precision: Precision,
):
    """One head: q (sq, d), k (sk, d), v (sk, d_v) -> out, lse (sq,), magnitude, reach (sq, d_v)."""
    sq, sk = q.shape[0], k.shape[0]
    score_dtype, weight_dtype = precision.scores or q.dtype, precision.weights or q.dtype
    out_dtype = precision.out or q.dtype
    sink = rule.sink[where[1]] if rule.sink is not None else None
    q, k, v = q.to(score_dtype), k.to(score_dtype), v.to(weight_dtype)
    pieces, drop = [], rule.dropout
    for rows in torch.arange(sq, device=q.device).split(max(1, MAX_SCORES // max(1, sk))):
        p, lse = weigh(scores(q[rows], k, rule, rows, sq, where), sink)
        ones = (p.detach() > 0).to(p.dtype)
        if drop is not None:
            state, stream = (drop.seed, drop.offset), where[0] * heads + where[1]
            kept = philox.multipliers(drop.p, state, stream, rows, sk).to(p.dtype)
            p, ones = p * kept, ones * kept
        p, ones = p.to(weight_dtype), ones.to(weight_dtype)
        sizes = (x.detach() @ v.detach().abs() for x in (p, ones))
        pieces.append(((p @ v).to(out_dtype), lse, *sizes))
    return tuple(torch.cat(parts) for parts in zip(*pieces, strict=True))


# --- one sequence, then lists of sequences --------------------------------------------------------


def attend(
    q: Tensor, k: Tensor, v: Tensor, rule: Rule, batch: int = 0, precision: Precision = EXACT
) -> Result:
    """q (sq, h, d), k (sk, h_k, d), v (sk, h_k, d_v): one sequence, all heads."""
    sq, heads, group, dtype = (
        q.shape[0],
        q.shape[1],
        q.shape[1] // k.shape[1],
        precision.out or q.dtype,
    )
    if sq == 0:
        nothing = torch.zeros(0, heads, v.shape[2], dtype=dtype, device=q.device)
        empty = torch.zeros(heads, 0, dtype=dtype, device=q.device)
        return Result(nothing, empty, nothing, nothing)
    per_head = [
        attend_head(q[:, h], k[:, h // group], v[:, h // group], rule, (batch, h), heads, precision)
        for h in range(heads)
    ]
    out, lse, *sizes = zip(*per_head, strict=True)
    return Result(torch.stack(out, 1), torch.stack(lse, 0), *(torch.stack(x, 1) for x in sizes))


def attend_all(qs, ks, vs, rule: Rule, precision: Precision = EXACT) -> list[Result]:
    """The same for lists of sequences, as the functions below cut them out of each layout."""
    return [
        attend(q, k, v, rule, b, precision)
        for b, (q, k, v) in enumerate(zip(qs, ks, vs, strict=True))
    ]


def lengths(used, batch: int, default: int | Sequence[int]) -> list[int]:
    """Tokens of each sequence: those that `used` says (negative = none), else the default."""
    if used is None:
        return [default] * batch if isinstance(default, int) else list(default)
    if isinstance(used, int):
        used = [used] * batch
    return [max(0, int(n)) for n in used]


def from_dense(x: Tensor, used=None, batch_idx=None) -> list[Tensor]:
    """x (b, s, h, d) -> [(n_b, h, d)]; batch_idx says which row of x belongs to which sequence."""
    rows = range(x.shape[0]) if batch_idx is None else [int(r) for r in batch_idx]
    return [x[r, :n] for r, n in zip(rows, lengths(used, len(rows), x.shape[1]), strict=True)]


def from_packed(x: Tensor, cu_seqlens, used=None) -> list[Tensor]:
    """x (total, h, d) -> [(n_b, h, d)]."""
    starts = [int(c) for c in cu_seqlens]
    whole = [b - a for a, b in zip(starts[:-1], starts[1:], strict=True)]
    return [
        x[a : a + n] for a, n in zip(starts[:-1], lengths(used, len(whole), whole), strict=True)
    ]


def from_paged(x: Tensor, page_table: Tensor, used=None) -> list[Tensor]:
    """x (pages, page_size, h, d), page_table (b, max_pages) -> [(n_b, h, d)]."""
    size = x.shape[1]
    out = []
    for row, n in zip(
        page_table.tolist(), lengths(used, len(page_table), page_table.shape[1] * size), strict=True
    ):
        tokens = [x[row[t // size], t % size] for t in range(n)]
        out.append(torch.stack(tokens) if tokens else x.new_zeros(0, *x.shape[2:]))
    return out


# --- K/V append -----------------------------------------------------------------------------------


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Sequence[int], interleaved: bool
) -> Tensor:
    """Rotary embedding of x (s, h, d) in float64, by cos, sin (seqlen_ro, r / 2): r of d dims turn.

    Pair number t is dimensions (2t, 2t + 1) when interleaved, else (t, t + r / 2):
        (a, b) -> (a cos - b sin, a sin + b cos)
    """
    pair = torch.arange(cos.shape[1], device=x.device)
    first = 2 * pair if interleaved else pair
    second = first + 1 if interleaved else pair + len(pair)
    at = torch.tensor(positions, dtype=torch.long, device=x.device)
    c, d = (table[at].double()[:, None, :] for table in (cos, sin))
    out = x.double().clone()
    a, b = out[..., first], out[..., second]
    out[..., first], out[..., second] = a * c - b * d, a * d + b * c
    return out


def query_positions(length: int, count: int, rule: Rule) -> list[int]:
    """Where rotary places the queries: one after another under a mask, else all at the end."""
    local = any(math.isfinite(bound) for bound in rule.bounds())
    return [length + i if local else length for i in range(count)]


def append(
    cache: Tensor, new: Sequence[Tensor], used, *, page_table=None, batch_idx=None
) -> Tensor:
    """A copy of cache with new[b] (n_b, h, d) from token used[b] on; none where it is negative."""
    cache = cache.clone()
    for b, tokens in enumerate(new):
        start = int(used[b])
        if start < 0:
            continue
        for t in range(tokens.shape[0]):
            at = start + t
            if page_table is not None:
                cache[int(page_table[b, at // cache.shape[1]]), at % cache.shape[1]] = tokens[t].to(
                    cache.dtype
                )
            else:
                row = b if batch_idx is None else int(batch_idx[b])
                cache[row, at] = tokens[t].to(cache.dtype)
    return cache


# --- merging partial results ----------------------------------------------------------------------


def combine(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """outs [(..., d_v)], lses [(...)] over disjoint sets of keys -> over their union, float64."""
    out, lse = torch.stack(list(outs)).double(), torch.stack(list(lses)).double()
    peak = lse.amax(0)
    peak = torch.where(peak.isinf(), 0.0, peak)
    weight = torch.exp(lse - peak)
    total = weight.sum(0)
    share = weight / torch.where(total == 0, 1.0, total)
    out = torch.where(share[..., None] == 0, 0.0, out)  # a part without keys may hold anything
    return (share[..., None] * out).sum(0), peak + torch.log(total)
