"""The tensors of a Case: what the numbers look like and where they lie in memory.

Whatever memory holds beside the tokens that count is NaN: padding, unused pages, tokens past
seqused. It must never reach a result.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .cases import FP8, Case

JUNK_PAGE = 2**31 - 1  # in page_table where nothing may look


# --- what the numbers look like -------------------------------------------------------------------


def _outlier(q: Tensor, k: Tensor, v: Tensor) -> None:
    """One channel far above the rest, as real activations have; one column of V likewise."""
    q[..., 3] *= 12
    k[..., 3] *= 12
    v[..., 5] *= 300


def _minus_inf(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Scores of -inf, from a channel that is positive in q and -inf in every third key."""
    q[..., 0] = q[..., 0].abs() + 0.5
    k[::3, :, 0] = -math.inf


FILLS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "normal": lambda q, k, v: None,
    "peaked": lambda q, k, v: q.mul_(15),
    "outlier": _outlier,
    "constant": lambda q, k, v: (q.fill_(0.5), k.fill_(0.25), v.fill_(-1.5)),
    "zeros": lambda q, k, v: (q.zero_(), k.zero_()),
    "shifted": lambda q, k, v: (q.add_(2), k.add_(-2)),  # every score far below zero
    "minus_inf": _minus_inf,
    "large_v": lambda q, k, v: v.mul_(4096),
}


def generator(case: Case, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(zlib.crc32(case.name.encode()))


def draw(case: Case, device: torch.device) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """All tokens in memory, by sequence: q (n, h, d), k (m, h_k, d), v (m, h_k, d_v)."""
    gen, d_v = generator(case, device), case.d_v or case.d

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, device=device)

    qs, ks, vs = [], [], []
    for sq, sk in zip(case.seqlens_q, case.seqlens_k, strict=True):
        q, k, v = (
            normal(sq, case.heads, case.d),
            normal(sk, case.heads_kv, case.d),
            normal(sk, case.heads_kv, d_v),
        )
        FILLS[case.fill](q, k, v)
        for kept, x in ((qs, q), (ks, k), (vs, v)):
            kept.append(x.to(case.dtype))
    return qs, repeated(case, ks), repeated(case, vs)


def quantised(xs: Sequence[Tensor], factors: Tensor) -> list[Tensor]:
    """Keys or values (n, h_k, d) of each sequence as an fp8 cache holds them."""
    scaled = [x.double() / f[:, None] for x, f in zip(xs, factors.double(), strict=True)]
    return [x.clamp(-448, 448).to(FP8) for x in scaled]


def dequantised(xs: Sequence[Tensor], factors: Tensor) -> list[Tensor]:
    """What they mean, in float32."""
    return [x.float() * f[:, None] for x, f in zip(xs, factors, strict=True)]


def repeated(case: Case, xs: list[Tensor]) -> list[Tensor]:
    """What expanded tensors hold: the first sequence's or the first head's tokens throughout."""
    if case.strides == "expanded_batch":
        return xs[:1] * len(xs)
    return [x[:, :1].expand_as(x) for x in xs] if case.strides == "expanded_heads" else xs


# --- where they lie in memory ---------------------------------------------------------------------
# Each function gives a tensor of x's shape and values, x (b, s, h, d) or (total, h, d).


def nan_like(x: Tensor, *shape: int) -> Tensor:
    """NaN of this shape, of x's dtype, where x lives."""
    return torch.full(shape, math.nan, dtype=x.dtype, device=x.device)


def transposed(x: Tensor) -> Tensor:
    """(b, h, s, d) in memory: what Transformers passes."""
    return x.transpose(-3, -2).contiguous().transpose(-3, -2)


def padded(x: Tensor) -> Tensor:
    """Rows and heads apart from each other, by multiples of 16 bytes."""
    *outer, h, d = x.shape
    store = nan_like(x, *outer, h + 1, d + 16)
    store[..., :h, :d] = x
    return store[..., :h, :d]


def sliced(x: Tensor) -> Tensor:
    """The tail of a longer tensor: another base address, another batch stride."""
    store = torch.cat([torch.full_like(x[..., :8, :, :], math.nan), x], dim=-3)
    return store[..., store.shape[-3] - x.shape[-3] :, :, :]


def shifted_by_one(x: Tensor) -> Tensor:
    """A base address that is aligned to one element only."""
    store = nan_like(x, x.numel() + 1)
    store[1:] = x.flatten()
    return store[1:].view(x.shape)


def odd_stride(x: Tensor) -> Tensor:
    """Heads an odd number of elements apart."""
    store = nan_like(x, *x.shape[:-1], x.shape[-1] + 1)
    store[..., :-1] = x
    return store[..., :-1]


def expanded_heads(x: Tensor) -> Tensor:
    return x[..., :1, :].contiguous().expand_as(x)


def expanded_batch(x: Tensor) -> Tensor:
    return x[:1].contiguous().expand_as(x)


def interleaved_kv(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """vLLM's cache: (pages, h_k, page_size, 2 d), K and V side by side; dense and packed alike."""
    store = torch.cat([k, v], dim=-1).transpose(-3, -2).contiguous().transpose(-3, -2)
    return store[..., : k.shape[-1]], store[..., k.shape[-1] :]


def packed_qkv(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views of one (b, s, h + 2 h_k, d): the output of a fused projection."""
    sizes = [x.shape[-2] for x in (q, k, v)]
    return tuple(torch.cat([q, k, v], dim=-2).split(sizes, dim=-2))


PLACEMENTS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "contiguous": lambda q, k, v: (q, k, v),
    "transposed": lambda q, k, v: (transposed(q), transposed(k), transposed(v)),
    "padded": lambda q, k, v: (padded(q), padded(k), padded(v)),
    "sliced": lambda q, k, v: (sliced(q), sliced(k), sliced(v)),
    "shifted_by_one": lambda q, k, v: (shifted_by_one(q), k, shifted_by_one(v)),
    "odd_stride": lambda q, k, v: (q, odd_stride(k), v),
    "expanded_heads": lambda q, k, v: (q, expanded_heads(k), expanded_heads(v)),
    "expanded_batch": lambda q, k, v: (q, expanded_batch(k), expanded_batch(v)),
    "interleaved_kv": lambda q, k, v: (q, *interleaved_kv(k, v)),
    "packed_qkv": packed_qkv,
}


# --- sequences, used tokens, pages ----------------------------------------------------------------


def keep_used(
    xs: Sequence[Tensor], used: Sequence[int] | None
) -> tuple[list[Tensor], list[Tensor]]:
    """(the tokens that count, all tokens with NaN in place of the others)."""
    if used is None:
        return list(xs), list(xs)
    counting = [x[: max(0, n)] for x, n in zip(xs, used, strict=True)]
    spoiled = [x.clone() for x in xs]
    for x, n in zip(spoiled, used, strict=True):
        x[max(0, n) :] = math.nan
    return counting, spoiled


def cumulative(xs: Sequence[Tensor], device: torch.device) -> Tensor:
    """cu_seqlens of these sequences."""
    counts = torch.tensor([0] + [len(x) for x in xs])
    return counts.cumsum(0).to(device, torch.int32)


def int32(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32, device=device)


def stack(xs: Sequence[Tensor], like: tuple[int, int], dtype: torch.dtype, device) -> Tensor:
    """(b, s, h, d); also for b = 0."""
    return torch.stack(list(xs)) if xs else torch.empty(0, 0, *like, dtype=dtype, device=device)


def pack(xs: Sequence[Tensor], like: tuple[int, int], dtype: torch.dtype, device) -> Tensor:
    """(total, h, d); also for b = 0."""
    return torch.cat(list(xs)) if xs else torch.empty(0, *like, dtype=dtype, device=device)


def shuffled_pages(
    counts: Sequence[int], size: int, gen: torch.Generator, spare: int = 3
) -> tuple[list[list[int]], int]:
    """A page number for each page that sequences of these lengths need, and how many there are."""
    need = [math.ceil(max(0, n) / size) for n in counts]
    order = torch.randperm(sum(need) + spare, generator=gen, device=gen.device).tolist()
    starts = torch.tensor([0] + need).cumsum(0).tolist()
    return [order[a:b] for a, b in zip(starts[:-1], starts[1:], strict=True)], len(order)


def fill_pages(xs: Sequence[Tensor], pages: list[list[int]], count: int, size: int) -> Tensor:
    """(count, size, h, d) with the sequences in their pages and NaN everywhere else."""
    store = nan_like(xs[0], count, size, *xs[0].shape[1:])
    for x, numbers in zip(xs, pages, strict=True):
        for page, tokens in zip(numbers, x.split(size), strict=False):
            store[page, : len(tokens)] = tokens
    return store


def page_table(pages: list[list[int]], width: int, device: torch.device) -> Tensor:
    """(b, width), with entries past the end that must not be followed: -1 and a number far off."""
    rows = [row + [(-1, JUNK_PAGE)[i % 2] for i in range(width - len(row))] for row in pages]
    return torch.tensor(rows, dtype=torch.int32, device=device).reshape(len(pages), width)
