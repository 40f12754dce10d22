"""One attention question for the command line: its shape, its inputs and its exact answer."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

LSE_LIMIT = 1e-4


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is asked. Positions are aligned to the bottom right; a bound of None is unbounded."""

    dtype: torch.dtype
    batch: int
    heads: int
    kv_heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    left: int | None = None
    right: int | None = None
    softcap: float = 0.0
    sink: bool = False
    varlen: bool = False
    lengths: tuple[tuple[int, int], ...] = ()  # queries and keys of each sequence; or drawn
    page_size: int | None = None
    num_splits: int = 1
    pack_gqa: bool | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Tensors of a case, packed if it is varlen. Sequence b is rows starts[b] .. starts[b + 1]."""

    q: Tensor
    k: Tensor
    v: Tensor
    sink: Tensor | None
    cu_q: Tensor
    cu_k: Tensor

    def sequences(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Rows of the packed output, and q, k, v (s, h, d) of each sequence."""
        q, k, v = (x.flatten(0, -3) for x in (self.q, self.k, self.v))
        for b in range(len(self.cu_q) - 1):
            rows = slice(int(self.cu_q[b]), int(self.cu_q[b + 1]))
            keys = slice(int(self.cu_k[b]), int(self.cu_k[b + 1]))
            yield rows, q[rows], k[keys], v[keys]


def make_inputs(case: Case) -> Inputs:
    """Normal q, k, v. Varlen lengths that are drawn: the first sequence all, the last nothing."""
    draw = torch.Generator().manual_seed(case.seed)

    def ends(given: int, longest: int) -> Tensor:
        sizes = torch.full((case.batch,), longest)
        if case.lengths:
            sizes = torch.tensor(case.lengths)[:, given]
        elif case.varlen and case.batch > 1:
            sizes[1:] = torch.randint(0, longest + 1, (case.batch - 1,), generator=draw)
            sizes[-1] = 0
        return torch.cat([torch.zeros(1), sizes.cumsum(0)]).to(torch.int32)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=draw).to(case.dtype)

    cu_q, cu_k = ends(0, case.seqlen_q), ends(1, case.seqlen_k)
    rows: tuple[int, ...] = (case.batch, case.seqlen_q)
    keys: tuple[int, ...] = (case.batch, case.seqlen_k)
    if case.varlen:
        rows, keys = (int(cu_q[-1]),), (int(cu_k[-1]),)
    return Inputs(
        q=normal(*rows, case.heads, case.head_dim),
        k=normal(*keys, case.kv_heads, case.head_dim),
        v=normal(*keys, case.kv_heads, case.head_dim_v),
        sink=normal(case.heads) if case.sink else None,
        cu_q=cu_q,
        cu_k=cu_k,
    )


def hides(case: Case, sq: int, sk: int) -> Tensor:
    """(sq, sk): whether a query must not see a key."""
    distance = torch.arange(sk) - (torch.arange(sq)[:, None] + sk - sq)
    hidden = torch.zeros(sq, sk, dtype=torch.bool)
    if case.left is not None:
        hidden |= distance < -case.left
    if case.right is not None:
        hidden |= distance > case.right
    return hidden


def visible(case: Case, inputs: Inputs) -> int:
    """Scores that count, over all heads and sequences."""
    pairs = 0
    for _, q, k, _ in inputs.sequences():
        pairs += int((~hides(case, len(q), len(k))).sum())
    return pairs * case.heads


def attention(
    case: Case, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(out (s, h, d_v), lse (h, s)) of one sequence, every step in the dtype of the inputs."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    groups = case.heads // case.kv_heads
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    scores = q @ k.transpose(-1, -2) / case.head_dim**0.5
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    sq, sk = scores.shape[-2:]
    hidden = hides(case, sq, sk)
    scores = scores.masked_fill(hidden, -torch.inf)
    blind = hidden.all(-1)  # also if there is no key
    if sink is not None:
        logit = sink.to(scores.dtype)[:, None, None].expand(-1, sq, 1)
        scores = torch.cat([scores, logit], -1)
    lse = (
        scores.logsumexp(-1) if scores.shape[-1] else scores.new_full((case.heads, sq), -torch.inf)
    )
    weights = scores.softmax(-1).masked_fill(blind[:, None], 0.0)
    return (weights[..., :sk] @ v).transpose(0, 1), lse


def cut_into_pages(
    case: Case, inputs: Inputs, filler: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(k, v, page_table, seqused_k): pages in reverse order, `filler` behind each last key."""
    size = case.page_size or 1
    used = (inputs.cu_k[1:] - inputs.cu_k[:-1]).to(torch.int32)
    table = torch.zeros(len(used), max(1, -(-case.seqlen_k // size)), dtype=torch.int32)
    last = int((-(-used // size)).sum())  # the page that is given next is the one before
    total = max(last, 1)
    k = torch.full((total, size, case.kv_heads, case.head_dim), filler, dtype=case.dtype)
    v = torch.full((total, size, case.kv_heads, case.head_dim_v), filler, dtype=case.dtype)
    for b, (_, _, keys, values) in enumerate(inputs.sequences()):
        for number, start in enumerate(range(0, len(keys), size)):
            last -= 1
            table[b, number] = last
            part = slice(start, min(start + size, len(keys)))
            k[last, : part.stop - start], v[last, : part.stop - start] = keys[part], values[part]
    return k, v, table, used


@dataclass
class Verdict:
    """Measured errors beside what is allowed."""

    max_abs_err: float = 0.0
    limit: float = 0.0
    lse_err: float = 0.0
    ok: bool = True


def judge(case: Case, inputs: Inputs, out: Tensor, lse: Tensor) -> Verdict:
    """Compare out like q, and lse (b, h, s) or (h, total), with float64.

    out may be off by twice PyTorch's own error in the inputs' dtype (three times with softcap) and
    twice the rounding of that dtype; lse by 1e-4, and must be infinite exactly where it is.
    """
    verdict = Verdict()
    out = out.flatten(0, -3)
    lse = lse if lse.dim() == 2 else lse.transpose(0, 1).flatten(1)
    for rows, q, k, v in inputs.sequences():
        exact, exact_lse = attention(case, q.double(), k.double(), v.double(), inputs.sink)
        if exact.numel() == 0:
            continue
        naive, _ = attention(case, q, k, v, inputs.sink)
        error = _largest(out[rows].double() - exact)
        rounded = exact.to(case.dtype)
        limit = (3 if case.softcap else 2) * _largest(naive.double() - exact)
        limit += 2 * _largest(rounded + 0.3 - 0.3 - rounded)
        finite = exact_lse.isfinite()
        found = lse[:, rows].double()
        lse_error = _largest((found - exact_lse)[finite])
        if not torch.equal(found[~finite], exact_lse[~finite]):
            lse_error = float("inf")
        verdict.ok &= error <= limit and lse_error <= LSE_LIMIT
        if not error <= verdict.max_abs_err:  # NaN stays
            verdict.max_abs_err, verdict.limit = error, limit
        verdict.lse_err = lse_error if not lse_error <= verdict.lse_err else verdict.lse_err
    return verdict


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
