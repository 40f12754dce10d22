"""The question that the kernels answer, and the only place that checks what a user passed.

    AttentionTensors + AttentionOptions --from_tensors--> AttentionProblem --make_plan--> Plan

`AttentionProblem` holds everything that may decide which kernel runs and nothing that is a tensor's
value, so it is hashable and a CUDA tensor is never read here. What only the values can show (a
descending `cu_seqlens`, a page number out of range) is checked in `values`, for CPU tensors.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter

import torch
from torch import Tensor

from . import checks, validation
from .block_sparse import BlockSparse
from .mask_rule import FULL, Band, Custom, Full, MaskRule, band_of, make_mask_rule

__all__ = [
    "AttentionOptions",
    "AttentionProblem",
    "AttentionTensors",
    "Band",
    "Custom",
    "Full",
    "Layout",
    "MaskRule",
    "band_of",
    "make_mask_rule",
]


class Layout(enum.Enum):
    """How sequences lie in memory."""

    DENSE = "dense"  # (batch, seqlen, heads, d)
    VARLEN = "varlen"  # (total, heads, d), cut by cu_seqlens
    PAGED = "paged"  # (pages, page_size, heads, d), found through page_table


@dataclass(slots=True, kw_only=True)
class AttentionTensors:
    """The tensors of one call. `out` and `lse` are filled in once the problem is known to be valid.

    Shapes, with b sequences, h query heads and h_k key heads:
        q: (b, sq, h, d), or (total_q, h, d) with cu_seqlens_q
        k, v: (b, sk, h_k, d | d_v), or (total_k, h_k, d | d_v) with cu_seqlens_k,
            or (pages, page_size, h_k, d | d_v) with page_table
        out: like q, with d_v instead of d, q's dtype
        lse: float32 (b, h, sq) or (h, total_q), natural logarithm
        cu_seqlens_q, cu_seqlens_k: int32 (b + 1,), starts of the sequences and the end of the last
        seqused_q, seqused_k: int32 (b,), tokens that count; 0 or less is an empty sequence
        page_table: int32 (b, max_pages); entries past the end of a sequence are never read
        kv_batch_idx: int32 (b,), the row of dense k and v that belongs to each sequence
        cache_leftpad: int32 (b,), the first key that counts in each row of dense k and v
        k_descale, v_descale: float32 (b, h_k), factors of fp8 k and v; None is 1
        sink: (h,) float, a logit that takes part in every softmax without a value
        alibi_slopes: float32 (h,) or (b, h)
        dropout_state: int64 (2,), the Philox seed and offset
        aux_tensors: handed to score_mod and mask_mod as they are
        blocks: the lists of a block-sparse mask
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor | None = None
    lse: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None
    page_table: Tensor | None = None
    kv_batch_idx: Tensor | None = None
    cache_leftpad: Tensor | None = None
    k_descale: Tensor | None = None
    v_descale: Tensor | None = None
    sink: Tensor | None = None
    alibi_slopes: Tensor | None = None
    dropout_state: Tensor | None = None
    aux_tensors: tuple[Tensor, ...] | None = None
    blocks: BlockSparse | None = None


# The tensors that a call may have besides q, k and v; a flat call has them in this order.
OTHERS = (
    "out",
    "lse",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "seqused_q",
    "seqused_k",
    "page_table",
    "kv_batch_idx",
    "cache_leftpad",
    "k_descale",
    "v_descale",
    "sink",
    "alibi_slopes",
)
others_of = attrgetter(*OTHERS)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionOptions:
    """The arguments of one call that are not tensors, brought into canonical form.

    softmax_scale None is 1 / sqrt(d); softcap and dropout_p 0.0 or None are off; num_splits 0 or
    None lets the plan decide; a maximum of None is derived from the tensors' shapes. Numbers count
    by their value: NumPy's, 0-d CPU tensors, True for 1 and 2.0 for 2 become what they equal, so
    that one kernel serves them all; a maximum that lies on a device becomes None.
    """

    mask: MaskRule = FULL
    softmax_scale: float | None = None
    softcap: float = 0.0
    score_mod: Callable | None = None
    dropout_p: float = 0.0
    deterministic: bool = False
    num_splits: int = 0
    pack_gqa: bool | None = None
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    return_lse: bool = False
    requires_grad: bool = False

    def __hash__(self) -> int:
        # Of the fields that tell calls apart in practice: every call looks its options up.
        return hash((self.softmax_scale, self.max_seqlen_q, self.max_seqlen_k, self.num_splits))

    def __post_init__(self) -> None:
        # Almost every call passes plain numbers: the common path is these comparisons.
        if type(self.softcap) is not float or (
            self.softmax_scale is not None and type(self.softmax_scale) is not float
        ):
            self._canonicalise(checks.as_float, "softmax_scale", "softcap")
        if type(self.dropout_p) is not float:
            self._canonicalise(checks.as_float, "dropout_p")
        if type(self.num_splits) is not int:
            self._canonicalise(checks.as_int, "num_splits")
        for name, off in (("softcap", 0.0), ("dropout_p", 0.0), ("num_splits", 0)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, off)
        if self.max_seqlen_q is not None or self.max_seqlen_k is not None:
            self._canonicalise(checks.as_maximum, "max_seqlen_q", "max_seqlen_k")
        if self.pack_gqa is not None and type(self.pack_gqa) is not bool:
            self._canonicalise(_as_choice, "pack_gqa")

    @property
    def holds_function(self) -> bool:
        """Whether a function of the user's is among them, which whoever keeps them keeps alive."""
        return self.score_mod is not None or type(self.mask) is Custom

    def _canonicalise(self, convert: Callable, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, convert(name, value))


def _as_choice(name: str, value: object) -> bool:
    return checks.as_bool(name, value, "True, False or None", "None to let the plan decide")


_numbers: dict[AttentionOptions, int] = {}
_next_number = itertools.count(1)


def numbered(options: AttentionOptions) -> int:
    """A number for all options equal to these but for max_seqlen_k, to know calls by; 0: none.

    Options that hold a callable, which would be kept alive, and calls that autograd records have
    none.
    """
    if options.requires_grad or options.holds_function:
        return 0
    if options.max_seqlen_k is not None:
        options = replace(options, max_seqlen_k=None)
    number = _numbers.get(options)
    if number is None:
        if len(_numbers) >= _MAX_KNOWN:
            _numbers.clear()
        number = _numbers[options] = next(_next_number)
    return number


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionProblem:
    """One attention call as the planner sees it: hashable, and free of tensors.

    `seqlen_q` and `seqlen_k` are exact for dense layouts and upper bounds for the others.
    `misfits` names those of q, k, v and out that do not suit 16-byte copies and TMA descriptors,
    each with the reason; see `misfit`.
    """

    device: torch.device
    dtype: torch.dtype
    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads: int
    num_heads_kv: int
    head_dim: int
    head_dim_v: int
    q_layout: Layout
    kv_layout: Layout
    page_size: int | None
    mask: MaskRule
    softmax_scale: float
    softcap: float
    has_seqused_q: bool
    has_seqused_k: bool
    has_kv_batch_idx: bool
    has_sink: bool
    has_alibi: bool
    score_mod: Callable | None
    dropout_p: float
    deterministic: bool
    num_splits: int
    pack_gqa: bool | None
    return_lse: bool
    requires_grad: bool
    misfits: tuple[tuple[str, str], ...] = ()
    has_cache_leftpad: bool = False
    fp8_kv: bool = False
    has_k_descale: bool = False
    has_v_descale: bool = False
    sink_dtype: torch.dtype | None = None
    aux: tuple[tuple[torch.dtype, int], ...] = ()
    block_size: tuple[int, int] | None = None

    @classmethod
    def from_tensors(cls, tensors: AttentionTensors, options: AttentionOptions) -> AttentionProblem:
        """Check one call and describe it.

        Reads shapes, strides, dtypes, devices and addresses, never values. A call that differs
        from an earlier one in values only gets the earlier one's very object.

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: shapes, devices or numbers that contradict each other or the rules above.
            NotImplementedError: a combination that is well-defined but not provided.
        """
        signature = signature_of(tensors, options)
        problem = _known.get(signature)
        if problem is None:
            problem = cls._checked(tensors, options)
            if signature is not None:
                if len(_known) >= _MAX_KNOWN:
                    _known.clear()
                _known[signature] = problem
        return problem

    @classmethod
    def _checked(cls, tensors: AttentionTensors, options: AttentionOptions) -> AttentionProblem:
        q, k, v = tensors.q, tensors.k, tensors.v
        validation.check_qkv_types(q, k, v)
        batch, seqlen_q = validation.query_extent(tensors, options)
        seqlen_k = validation.key_extent(tensors, options, batch)
        num_heads, head_dim = q.shape[-2:]
        num_heads_kv, head_dim_v = v.shape[-2:]
        validation.check_heads(q, k, v)
        validation.check_optional_tensors(tensors, batch, num_heads)
        validation.check_options(tensors, options)
        paged = tensors.page_table is not None
        return cls(
            device=q.device,
            dtype=q.dtype,
            batch=batch,
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            num_heads=num_heads,
            num_heads_kv=num_heads_kv,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            q_layout=Layout.DENSE if tensors.cu_seqlens_q is None else Layout.VARLEN,
            kv_layout=_kv_layout(tensors),
            page_size=k.shape[1] if paged else None,
            mask=options.mask,
            softmax_scale=(
                head_dim**-0.5 if options.softmax_scale is None else options.softmax_scale
            ),
            softcap=options.softcap,
            has_seqused_q=tensors.seqused_q is not None,
            has_seqused_k=tensors.seqused_k is not None,
            has_kv_batch_idx=tensors.kv_batch_idx is not None,
            has_sink=tensors.sink is not None,
            has_alibi=tensors.alibi_slopes is not None,
            score_mod=options.score_mod,
            dropout_p=options.dropout_p,
            deterministic=options.deterministic,
            num_splits=options.num_splits,
            pack_gqa=options.pack_gqa,
            return_lse=options.return_lse,
            requires_grad=options.requires_grad,
            misfits=_misfits(tensors),
            has_cache_leftpad=tensors.cache_leftpad is not None,
            fp8_kv=k.dtype == checks.FP8,
            has_k_descale=tensors.k_descale is not None,
            has_v_descale=tensors.v_descale is not None,
            sink_dtype=None if tensors.sink is None else tensors.sink.dtype,
            block_size=None if tensors.blocks is None else tensors.blocks.block_size,
            aux=tuple((t.dtype, t.dim()) for t in tensors.aux_tensors or ()),
        )

    @property
    def holds_function(self) -> bool:
        """Whether a function of the user's is part of it, which whoever keeps it keeps alive."""
        return self.score_mod is not None or type(self.mask) is Custom

    @property
    def aligned(self) -> bool:
        """Whether all tensors can be read and written where they are."""
        return not self.misfits

    def out_shape(self, q: Tensor) -> tuple[int, ...]:
        """Shape of the output: q's, with d_v as the last dimension."""
        return (*q.shape[:-1], self.head_dim_v)

    def lse_shape(self, q: Tensor) -> tuple[int, ...]:
        """Shape of the log-sum-exp: (b, h, sq), or (h, total_q) for packed queries."""
        if self.q_layout is Layout.DENSE:
            return (self.batch, self.num_heads, self.seqlen_q)
        return (self.num_heads, q.shape[0])


# Problems by the metadata of the calls that posed them: checking takes longer than looking up.
_known: dict[tuple | None, AttentionProblem] = {}
_MAX_KNOWN = 4096


def signature_of(t: AttentionTensors, options: AttentionOptions) -> tuple | None:
    """All that the checks of a call depend on, or None if it should be checked each time.

    Calls with callables would keep these alive, and calls that autograd records or whose arguments
    are not tensors are checked in full.
    """
    if (
        options.requires_grad
        or options.holds_function
        or t.aux_tensors is not None
        or t.blocks is not None
    ):
        return None
    q, k, v, out = t.q, t.k, t.v, t.out
    try:
        together = q.data_ptr() | k.data_ptr() | v.data_ptr()
        if out is not None:
            together |= out.data_ptr()
        addresses: tuple[int, ...] | None = None
        if together & 15:
            addresses = tuple(0 if x is None else x.data_ptr() & 15 for x in (q, k, v, out))
        metadata = [None if x is None else _metadata(x) for x in others_of(t)]
        return (
            *(q.shape, q.stride(), q.dtype, q.device),
            *(k.shape, k.stride(), k.dtype, k.device),
            *(v.shape, v.stride(), v.dtype, v.device),
            addresses,
            options,
            *metadata,
        )
    except AttributeError:  # not a tensor, as the check will say
        return None


def _metadata(t: Tensor) -> tuple:
    return t.shape, t.stride(), t.dtype, t.device


def is_aligned(t: Tensor) -> bool:
    """Whether `t` suits 16-byte copies: see `misfit`."""
    return misfit(t) is None


def misfit(t: Tensor) -> str | None:
    """Why `t` does not suit 16-byte copies and TMA descriptors, or None if it does.

    They need a contiguous last dimension, and a base address and all other strides (of dimensions
    larger than 1) that are positive multiples of 16 bytes.
    """
    if t.is_contiguous() and not (t.data_ptr() | t.shape[-1] * t.element_size()) & 15:
        return None  # as almost every tensor
    strides = t.stride()
    if strides[-1] != 1 and t.shape[-1] != 1:
        return f"its last dimension has stride {strides[-1]}, not 1"
    itemsize = t.element_size()
    for dim, (size, stride) in enumerate(zip(t.shape[:-1], strides[:-1], strict=True)):
        if size > 1 and (stride <= 0 or stride * itemsize % 16):
            return f"stride {stride} of dimension {dim} is no positive multiple of 16 bytes"
    return "its address is no multiple of 16" if t.data_ptr() % 16 else None


def _misfits(tensors: AttentionTensors) -> tuple[tuple[str, str], ...]:
    named = (("q", tensors.q), ("k", tensors.k), ("v", tensors.v), ("out", tensors.out))
    found = ((name, misfit(t)) for name, t in named if t is not None)
    return tuple((name, reason) for name, reason in found if reason is not None)


def _kv_layout(tensors: AttentionTensors) -> Layout:
    if tensors.page_table is not None:
        return Layout.PAGED
    return Layout.DENSE if tensors.cu_seqlens_k is None else Layout.VARLEN
