"""Upstream's backward kernels, known to be right on real chips, against float64 gradients.

Each case is several launches: preprocess, one or two kernels, one to three postprocesses.
"""

import importlib.util
from dataclasses import dataclass

import pytest
import torch

import ptx_emulator

from . import upstream


@dataclass(frozen=True)
class Case:
    """Shapes, a mask by (left, right) like upstream's window, and a schedule."""

    arch: str
    seqlens: tuple[int, int]
    heads: tuple[int, int] = (1, 1)
    d: int = 64
    d_v: int | None = None
    window: tuple[int | None, int | None] = (None, None)
    schedule: int = 0
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        left, right = self.window
        shape = f"{self.seqlens[0]}x{self.seqlens[1]}-h{self.heads[0]}.{self.heads[1]}-d{self.d}"
        return f"{self.arch}-{shape}-{left},{right}-s{self.schedule}"


CAUSAL = (None, 0)
CASES = [
    Case("sm_90a", (128, 128)),
    Case("sm_90a", (200, 300), (2, 1), window=CAUSAL, schedule=3),
    Case("sm_90a", (130, 257), (2, 1), window=CAUSAL),
    Case("sm_90a", (200, 150), d=128, window=CAUSAL),
    Case("sm_90a", (256, 130), d=96, schedule=2),
    Case("sm_90a", (200, 260), d=128, window=(40, 10), dtype=torch.float16),
    Case("sm_100a", (128, 128)),
    Case("sm_100a", (130, 300), (2, 1), window=CAUSAL, schedule=3),
    Case("sm_100a", (300, 200), (2, 1), window=CAUSAL),
    Case("sm_100a", (256, 256), d=128),  # from here on, a pair of CTAs
    Case("sm_100a", (300, 180), d=128, schedule=5),
    Case("sm_100a", (200, 150), (2, 1), d=128, window=CAUSAL),
    Case("sm_100a", (200, 260), d=128, window=(40, 10), dtype=torch.float16),
    Case("sm_100a", (200, 300), d=192, d_v=128, window=CAUSAL),
]


def attention(q, k, v, window):
    """(out, lse) of q (s, h, d), k, v (s, h_k, d) in their dtype."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    groups = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    rows, columns = scores.shape[-2:]
    offset = torch.arange(columns) - torch.arange(rows)[:, None] - (columns - rows)
    left, right = window
    keep = torch.ones(rows, columns, dtype=torch.bool)
    if left is not None:
        keep &= offset >= -left
    if right is not None:
        keep &= offset <= right
    scores = scores.masked_fill(~keep, -torch.inf)
    empty = ~keep.any(1)[:, None]  # rows that see nothing have no gradient
    lse = scores.masked_fill(empty, 0.0).logsumexp(-1)
    weights = (scores - lse.unsqueeze(-1)).exp()
    lse = lse.masked_fill(empty[:, 0], -torch.inf)
    return (weights @ v).transpose(0, 1), lse


def gradients(q, k, v, dout, window):
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    attention(*leaves, window)[0].backward(dout)
    return [leaf.grad for leaf in leaves]


def check(found, q, k, v, dout, window):
    """FACTS' rule for each gradient: twice PyTorch's own error and rounding."""
    exact = gradients(q.double(), k.double(), v.double(), dout.double(), window)
    rounded = gradients(q, k, v, dout, window)
    for name, got, right, plain in zip("qkv", found, exact, rounded, strict=True):
        error = (got.double() - right).abs().max().item()
        single = right.float()
        limit = 2 * (plain.double() - right).abs().max().item()
        limit += 2 * (single + 0.3 - 0.3 - single).abs().max().item()
        assert error <= limit, f"d{name} is off by {error:.3g}, allowed {limit:.3g}"


def normal(*size, dtype=torch.bfloat16, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make(case, rows, keys, seed=0):
    """(q, k, v, out, dout, lse) of one sequence; out and lse are exact but for their rounding."""
    d_v = case.d_v or case.d
    sizes = [
        (rows, case.heads[0], case.d),
        (keys, case.heads[1], case.d),
        (keys, case.heads[1], d_v),
        (rows, case.heads[0], d_v),
    ]
    q, k, v, dout = (
        normal(*size, dtype=case.dtype, seed=4 * seed + index) for index, size in enumerate(sizes)
    )
    out, lse = attention(q.double(), k.double(), v.double(), case.window)
    return q, k, v, out.to(case.dtype).contiguous(), dout, lse.float().contiguous()


def backward(case, tensors, **options):
    if importlib.util.find_spec("flash_attn") is None:
        pytest.skip("upstream flash-attn-4 is not installed")
    left, right = case.window
    if case.window == CAUSAL:
        options["causal"] = True
    else:
        options |= {"window_size_left": left, "window_size_right": right}
    session = ptx_emulator.session(case.arch, schedule=case.schedule)
    with session as emulator, upstream.upstream_on(emulator) as module:
        found = upstream.backward(module, tensors, **options)
        assert len(emulator.runs) >= 3
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_backward(case):
    tensors = make(case, *case.seqlens)
    found = backward(case, tuple(x[None] for x in tensors))
    q, k, v, _, dout, _ = tensors
    check([x[0] for x in found], q, k, v, dout, case.window)


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_varlen(arch):
    """Packed sequences, one of them empty."""
    case = Case(arch, (0, 0), (2, 1), window=CAUSAL)
    rows, keys = (70, 0, 200), (130, 40, 200)
    parts = [make(case, *sizes, seed=i) for i, sizes in enumerate(zip(rows, keys, strict=True))]
    *packed, lses = zip(*parts, strict=True)
    tensors = (*(torch.cat(x) for x in packed), torch.cat(lses, 1))
    starts_q, starts_k = (
        torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        for sizes in (rows, keys)
    )
    found = backward(
        case,
        tensors,
        cu_seqlens_q=starts_q,
        cu_seqlens_k=starts_k,
        max_seqlen_q=200,
        max_seqlen_k=200,
    )
    for i in (0, 2):
        q, k, v, _, dout, _ = parts[i]
        at_q, at_k = (slice(s[i], s[i + 1]) for s in (starts_q, starts_k))
        check([found[0][at_q], found[1][at_k], found[2][at_k]], q, k, v, dout, case.window)
