"""A call that was made before, made again: nothing is decided anew, only addresses are passed on.

    key_of(options, tensors) --known--> Repeat --addresses--> the launches of the first such call

What a call on the GPU launches is decided by the metadata of its tensors and by its options. The
first call with a key leaves a `Repeat`; later ones take it. Calls are flat here: (q, k, v); the
tensors of `problem.OTHERS` in that order, then those of a CacheUpdate if there is one, or None for
no others; and rotary_interleaved, None without a CacheUpdate.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_dynamo_compiling

from .launcher import driver as drivers
from .launcher.kernel import Kernel, Patches, ReadyCall, Writes, apart
from .likeness import Likeness
from .overlap import overlap, span
from .problem import OTHERS, AttentionProblem
from .splits import planned_length

Others = tuple[Any, ...] | None  # of tensors and None
Launched = Sequence[tuple[Kernel, Any, ReadyCall]]  # kernels, their arguments, what came of it

_NEW = ("k_new", "v_new", "cache_seqlens", "cu_seqlens_k_new", "rotary_cos", "rotary_sin")
_MORE = (*OTHERS, *_NEW)
_OUT, _LSE, _CU_K, _USED_K = map(OTHERS.index, ("out", "lse", "cu_seqlens_k", "seqused_k"))
# What kernels move 16 bytes at a time: whether they can decides which kernel it is.
_ALIGNED = ("q", "k", "v", "out", "k_new", "v_new", "rotary_cos", "rotary_sin")
# Where the kernels' arguments come from; those of their scores are below `score`.
_SOURCES = {
    "mQ": "q",
    "mK": "k",
    "mV": "v",
    "mO": "out",
    "mLSE": "lse",
    "mCuSeqlensQ": "cu_seqlens_q",
    "mCuSeqlensK": "cu_seqlens_k",
    "mSeqUsedQ": "seqused_q",
    "mSeqUsedK": "seqused_k",
    "mPageTable": "page_table",
    "mKvRow": "kv_batch_idx",
    "mLeftPad": "cache_leftpad",
    "mKDescale": "k_descale",
    "mVDescale": "v_descale",
    "mAlibi": "alibi_slopes",
    "mSink": "sink",
    # Of the kernel that appends:
    "mKNew": "k_new",
    "mVNew": "v_new",
    "mCacheSeqlens": "cache_seqlens",
    "mCuSeqlensNew": "cu_seqlens_k_new",
    "mCos": "rotary_cos",
    "mSin": "rotary_sin",
    "mBatchIdx": "kv_batch_idx",
}
_ALIGNED_ARGUMENTS = [name for name, source in _SOURCES.items() if source in _ALIGNED]
# What nobody sees: one piece of memory holds all of it.
_SCRATCH = ("mWorkspace", "mTileCounter", "mQRotated", "mSeqUsed")
_ALIGN = 256
_MINUS_INF = 0xFF800000  # in float32
_ANYWHERE = (1 << 62,) * 4  # spans of tensors of which nothing is known
_MAX_DISTANCES = 64


def key_of(
    asked: Any,
    longest: int | None,
    qkv: tuple[Tensor, Tensor, Tensor],
    others: Others,
    interleaved: bool | None,
) -> tuple | None:
    """All that decides what a call launches, or None if it must be worked out each time.

    That is so where torch or autograd must see the call, and where something is no tensor, as the
    checks will say. `asked` stands for the options except max_seqlen_k, which is `longest`: of it
    the key has what a plan sees. Addresses decide too, see `Repeat.again`.
    """
    q, k, v = qkv
    # What torch.export traces without Dynamo is no plain tensor, and its shape no key.
    if is_dynamo_compiling() or not (type(q) is type(k) is type(v) is Tensor):
        return None
    # True stands for the strides of a contiguous tensor: those of dimensions of size 1, in which
    # such tensors may differ, reach no address.
    try:
        if is_grad_enabled() and _is_recorded(qkv, others):
            return None
        key = (
            q.shape, q.is_contiguous() or q.stride(), q.dtype, q.get_device(),
            k.shape, k.is_contiguous() or k.stride(), k.dtype, k.get_device(),
            v.shape, v.is_contiguous() or v.stride(), v.dtype, v.get_device(),
            asked,
        )  # fmt: skip
        if others is None:
            return key
        more = [*key, planned_bound(longest, others), interleaved]
        for t in others:
            if t is None:
                more.append(None)
            else:
                more += (t.shape, t.is_contiguous() or t.stride(), t.dtype, t.get_device())
        return tuple(more)
    except (AttributeError, RuntimeError):  # no tensor, or one without strides
        return None


def kind_of(asked: Any, longest: Any, others: tuple, interleaved: bool | None) -> tuple:
    """What a call is but for what its tensors are like, see `likeness`.

    Of a call without `others` that is `asked`.
    """
    return asked, planned_bound(longest, others), interleaved, *map(type, others)


def planned_bound(longest: Any, others: tuple) -> Any:
    """What a plan sees of max_seqlen_k."""
    if longest is None or others[_CU_K] is others[_USED_K] is None:
        return longest
    return planned_length(longest)


def _is_recorded(qkv: tuple[Tensor, Tensor, Tensor], others: Others) -> bool:
    """Whether autograd has to record the call, or it must be refused, where gradients are on."""
    for t in qkv if others is None else qkv + others:  # noqa: SIM110 (a generator takes longer)
        if t is not None and t.requires_grad:
            return True
    return False


class Repeat:
    """Allocates what the first call allocated, and launches what it launched.

    All launches take their addresses from one list: the stream; those of q, k, v, out and, if asked
    for, LSE; of what else they read, `more` places of a flat call; of scratch memory, if there is
    any; and addresses inside of these. `aligned` are the places in the list of what has to be
    aligned beside q, k, v and out.
    """

    def __init__(self, problem: AttentionProblem, launched: Launched, cleared: tuple[bool, bool]):
        arguments = launched[-1][1]
        out, lse = arguments.mO, arguments.mLSE
        self.driver, self.device = drivers.cuda_driver(), out.device.index or 0
        size, begins = _scratch(launched)
        self.likeness: Likeness | None = None  # of the tensors of such a call
        self.spans = _ANYWHERE  # of q, k, v and a given out, once one was seen
        self.apart: set[tuple[int, ...]] = set()  # from operands to results that lie apart
        self.new_out = contiguous(out.shape, out.dtype)
        self.new_lse = contiguous(lse.shape, lse.dtype) if problem.return_lse else None
        self.new_scratch = contiguous((size,), torch.uint8) if size else None
        sources = tuple([_sources(kernel, arguments) for kernel, arguments, _ in launched])
        patches = tuple([ready.patches for _, _, ready in launched])
        self.links = links = _linked(sources, patches, begins, self.new_lse is not None)
        self.more, self.aligned, self.derived = links.more, links.aligned, links.derived
        self.steps = [(ready, w) for (_, _, ready), w in zip(launched, links.writes, strict=True)]
        self.fills: list[tuple[int, int, int]] = []  # (place, number of words, word)
        if cleared[0]:
            self.fills.append((links.names.index("out"), out.nbytes // 4, 0))
        if cleared[1]:
            self.fills.append((links.names.index("lse"), lse.numel(), _MINUS_INF))
        if getattr(arguments, "reads_counter", False):
            scratch, begin = len(links.names), dict(begins)["mTileCounter"]
            place = scratch + 1 + self.derived.index((scratch, begin)) if begin else scratch
            self.fills.append((place, 1, 0))

    @staticmethod
    def of(
        problem: AttentionProblem, launched: Sequence[Any], cleared: tuple[bool, bool]
    ) -> Repeat | None:
        """From the launches of a call; None if it cannot be repeated like that.

        `launched` are, in order, what appended to a cache, if anything did, and the attention;
        `cleared` says whether out and lse hold 0 and -inf before.
        """
        if problem.misfits or problem.dropout_p:
            return None
        for found in launched:
            if found is None or not isinstance(found[0], Kernel) or found[0].program.decisive:
                return None
            if not _is_aligned(found[1]):
                return None
        return Repeat(problem, launched, cleared)

    def again(
        self, qkv: tuple[Tensor, Tensor, Tensor], others: Others
    ) -> tuple[Tensor, Tensor | None] | None:
        """(out, lse) of a call with the same key; lse is None unless it was asked for.

        None if memory is not aligned, so that the call must be worked out, or if the result lies on
        an operand, so that it must be refused.
        """
        driver, device = self.driver, self.device
        if driver.current_device() != device:
            with driver.on(device):
                return self.again(qkv, others)
        q, k, v = qkv
        out, lse = (None, None) if others is None else (others[_OUT], others[_LSE])
        q_at, k_at, v_at = q.data_ptr(), k.data_ptr(), v.data_ptr()
        if out is None:
            out = driver.empty(*self.new_out)
            out_at = out.data_ptr()
        else:
            out_at = out.data_ptr()
            q_span, k_span, v_span, out_span = self.spans
            end = out_at + out_span
            if (
                (out_at < q_at + q_span and q_at < end)
                or (out_at < k_at + k_span and k_at < end)
                or (out_at < v_at + v_span and v_at < end)
            ) and not self._lies_apart(out, qkv):
                return None
        together = q_at | k_at | v_at | out_at
        addresses = [driver.stream(device), q_at, k_at, v_at, out_at]
        if self.new_lse is not None:
            if lse is None:
                lse = driver.empty(*self.new_lse)
            elif not self._lies_apart(lse, (*qkv, out)):
                return None
            addresses.append(lse.data_ptr())
        if others is not None:
            for place in self.more:
                addresses.append(others[place].data_ptr())
            for place in self.aligned:
                together |= addresses[place]
        if together & 15:
            return None
        if self.new_scratch is not None:
            # From PyTorch's allocator: a CUDA graph owns its own, and streams do not share any.
            scratch = driver.empty(*self.new_scratch)
            addresses.append(scratch.data_ptr())
        for source, distance in self.derived:
            addresses.append(addresses[source] + distance)
        for place, number, word in self.fills:
            driver.fill(addresses[place], number, word, addresses[0])
        for ready, writes in self.steps:
            ready.issue(writes, addresses)
        return out, lse

    def _lies_apart(self, result: Tensor, operands: tuple[Tensor, ...]) -> bool:
        """Whether `result` shares no memory with any of them, as the columns of one buffer do not.

        The strides of such calls are the same, so it is up to the distances.
        """
        at = result.data_ptr()
        distances = tuple([at - t.data_ptr() for t in operands])
        if distances in self.apart:
            return True
        for operand in operands:
            if overlap(result, operand):
                return False
        if len(operands) == 3:
            q, k, v = operands
            self.spans = span(q), span(k), span(v), span(result)
        if len(self.apart) >= _MAX_DISTANCES:
            self.apart.clear()
        self.apart.add(distances)
        return True


def contiguous(shape: Sequence[int], dtype: torch.dtype) -> tuple:
    """What `Driver.empty` makes a contiguous tensor from."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(shape), tuple(reversed(strides)), dtype


class _Links(NamedTuple):
    """Which address of a Repeat's list goes where, and the `names` of the first of them."""

    names: list[str]
    more: tuple[int, ...]
    aligned: tuple[int, ...]
    writes: list[Writes]
    derived: Writes


@functools.lru_cache(maxsize=1024)
def _linked(
    sources: tuple[tuple[str, ...], ...],
    patches: tuple[Patches, ...],
    begins: tuple[tuple[str, int], ...],
    has_lse: bool,
) -> _Links:
    """Find that out for launches that read `sources`; the same for all shapes of a kernel."""
    found, parts = [*sources], dict(begins)
    if len(found) == 2:  # attention reads what was written before it
        written = {"seqused_k": "mSeqUsed", "q": "mQRotated"}
        written = {name: new for name, new in written.items() if new in parts}
        found[1] = tuple([written.get(name, name) for name in found[1]])
    seen = {name for names in found for name in names}
    first = ["stream", "q", "k", "v", "out"]
    if has_lse:
        first.append("lse")
    more = [name for name in _MORE if name in seen and name not in first]
    names = first + more
    where = {name: (i, 0) for i, name in enumerate(names)}
    where |= {name: (len(names), begin) for name, begin in begins}
    steps = []
    for places, named in zip(patches, found, strict=True):
        pairs = [where[name] for name in (*named, "stream")]
        steps.append([(at, pairs[n][0], pairs[n][1] + far) for at, n, far in places])
    writes, derived = apart(steps, len(names) + bool(begins))
    aligned = tuple(names.index(name) for name in more if name in _ALIGNED)
    return _Links(names, tuple(map(_MORE.index, more)), aligned, writes, derived)


def _scratch(launched: Launched) -> tuple[int, tuple[tuple[str, int], ...]]:
    """Bytes of all that nobody sees, and where each part of it begins."""
    size, begins = 0, []
    for _, arguments, _ in launched:
        for name in _SCRATCH:
            t = getattr(arguments, name, None)
            if t is not None:
                begins.append((name, size))
                size += -(-t.nbytes // _ALIGN) * _ALIGN
    return size, tuple(begins)


def _sources(kernel: Kernel, arguments: Any) -> tuple[str, ...]:
    """The names of what a kernel's pointers point to, in its order."""
    if kernel.sources is None:
        names = (_name(arguments, found.path[1:]) for found in kernel.pointer_inputs)
        kernel.sources = tuple([_SOURCES.get(name, name) for name in names])
    return kernel.sources


def _is_aligned(arguments: Any) -> bool:
    """Whether what of a kernel's arguments `_ALIGNED` names lies at multiples of 16 bytes."""
    together = 0
    for name in _ALIGNED_ARGUMENTS:
        t = getattr(arguments, name, None)
        if t is not None:
            together |= t.data_ptr()
    return not together & 15


def _name(arguments: Any, path: tuple[int, ...]) -> str:
    """The name of the field at `path` of nested named tuples."""
    *outer, last = path
    for index in outer:
        arguments = arguments[index]
    return arguments._fields[last]
