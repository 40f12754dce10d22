"""A call that was made before, made again: nothing is decided anew, only addresses are passed on.

    key_of(options, tensors) --known--> Repeat --addresses--> the launches of the first such call

What a call on the GPU launches is decided by the metadata of its tensors and by its options. The
first call with a key leaves a `Repeat`; later ones take it. Calls are flat here: (q, k, v), the
tensors of `problem.OTHERS` in that order or None for no others, and what a CacheUpdate is made of
or None.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from .launcher import driver as drivers
from .launcher.kernel import Kernel, Patches, ReadyCall
from .problem import OTHERS, AttentionOptions, AttentionProblem, AttentionTensors, Layout
from .scheduler_metadata import SchedulerMetadata

Others = tuple[Tensor | None, ...] | None
New = tuple[Any, ...] | None  # the fields of CacheUpdate
Launched = Sequence[tuple[Kernel, Any, ReadyCall]]  # kernels, their arguments, what came of it

_NEW = ("k_new", "v_new", "cache_seqlens", "cu_seqlens_k_new", "rotary_cos", "rotary_sin")
_NAMES = ("q", "k", "v", *OTHERS, *_NEW)
_NO_RESULTS = (None, None)  # in place of all others
_OUT, _LSE = _NAMES.index("out"), _NAMES.index("lse")
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
# What nobody sees: one piece of memory holds all of it.
_SCRATCH = ("mWorkspace", "mQRotated", "mSeqUsed")
_ALIGN = 256
_MINUS_INF = 0xFF800000  # in float32


def key_of(
    options: AttentionOptions,
    metadata: Any,
    qkv: tuple[Tensor, Tensor, Tensor],
    others: Others = None,
    new: New = None,
) -> tuple | None:
    """All that decides what a call launches, or None if it must be worked out each time.

    That is so without a number of the options, see `problem.numbered`, where addresses decide too,
    and where something is no tensor, as the checks will say.
    """
    q, k, v = qkv
    if not options.number or type(q) is not Tensor:
        return None
    if metadata is not None and type(metadata) is not SchedulerMetadata:
        return None
    try:
        together = q.data_ptr() | k.data_ptr() | v.data_ptr()
        if others is not None:
            if others[0] is not None:
                together |= others[0].data_ptr()
            others = _metadata(others)
        if new is not None:
            for t in new[:-1]:
                if t is not None:
                    together |= t.data_ptr()
            new = (new[-1], *_metadata(new[:-1]))
        if together & 15:
            return None
        return (
            *(q.shape, q.is_contiguous() or q.stride(), q.dtype, q.get_device()),
            *(k.shape, k.is_contiguous() or k.stride(), k.dtype, k.get_device()),
            *(v.shape, v.is_contiguous() or v.stride(), v.dtype, v.get_device()),
            options.number,
            metadata,
            others,
            new,
        )
    except AttributeError:
        return None


def _metadata(tensors: tuple) -> tuple:
    # True stands for the strides of a contiguous tensor: those of dimensions of size 1, in which
    # such tensors may differ, reach no address.
    return tuple(
        [
            t if t is None else (t.shape, t.is_contiguous() or t.stride(), t.dtype, t.get_device())
            for t in tensors
        ]
    )


class Repeat:
    """Allocates what the first call allocated, and launches what it launched.

    All launches take their addresses from one list: those of the tensors that `pick` takes out of
    a flat call, that of scratch memory if there is any, and the stream.
    """

    def __init__(self, problem: AttentionProblem, launched: Launched, results: tuple[bool, bool]):
        arguments = launched[-1][1]
        out, lse, q = arguments.mO, arguments.mLSE, arguments.mQ
        self.driver, self.device = drivers.cuda_driver(), out.device.index or 0
        size, begins = _scratch(launched)
        new = partial(torch.empty, device=out.device)
        self.new_out = partial(new, *out.shape, dtype=out.dtype)
        self.new_lse = partial(new, *lse.shape, dtype=lse.dtype) if problem.return_lse else None
        self.new_scratch = partial(new, size, dtype=torch.uint8) if size else None
        own_q = "mQRotated" not in begins  # then it is as contiguous as that of each call
        self.out_like_q = own_q and out.shape == q.shape and q.is_contiguous()
        names = self._link(launched, begins)
        self.fills: list[tuple[int, int, int]] = []  # (place, number of words, word)
        if is_sparse(problem):
            if not results[0]:
                self.fills.append((names.index("out"), out.nbytes // 4, 0))
            if lse is not None:
                self.fills.append((names.index("lse"), lse.numel(), _MINUS_INF))

    def _link(self, launched: Launched, begins: dict[str, int]) -> list[str]:
        """Find out which address of the list goes where; the names of the first of them."""
        found = [_sources(kernel, arguments) for kernel, arguments, _ in launched]
        if len(found) == 2:  # attention reads what was written before it
            written = {"seqused_k": "mSeqUsed", "q": "mQRotated"}
            written = {name: new for name, new in written.items() if new in begins}
            found[1] = [written.get(name, name) for name in found[1]]
        names = [name for names in found for name in names if name not in begins]
        names = list(dict.fromkeys(names))
        self.pick = itemgetter(*map(_NAMES.index, names))
        stream = len(names) + bool(begins)
        where = {name: (i, 0) for i, name in enumerate(names)}
        where |= {name: (len(names), begin) for name, begin in begins.items()}
        self.steps: list[tuple[ReadyCall, Patches]] = []
        for (_, _, ready), sources in zip(launched, found, strict=True):
            pairs = [*(where[name] for name in sources), (stream, 0)]
            patches = [(at, pairs[n][0], pairs[n][1] + more) for at, n, more in ready.patches]
            self.steps.append((ready, tuple(patches)))
        return names

    @staticmethod
    def of(
        problem: AttentionProblem, launched: Sequence[Any], results: tuple[bool, bool]
    ) -> Repeat | None:
        """From the launches of a call; None if it cannot be repeated like that.

        `launched` are, in order, what appended to a cache, if anything did, and the attention;
        `results` says whether the caller gave out and lse.
        """
        if problem.misfits or problem.dropout_p:
            return None
        for found in launched:
            if found is None or not isinstance(found[0], Kernel) or found[0].program.decisive:
                return None
        lse = launched[-1][1].mLSE
        if lse is not None and not lse.is_contiguous() and is_sparse(problem):
            return None
        return Repeat(problem, launched, results)

    def __call__(
        self, qkv: tuple[Tensor, Tensor, Tensor], others: Others, new: New
    ) -> tuple[Tensor, Tensor | None]:
        """(out, lse) of a call with the same key; lse is None unless it was asked for."""
        given: list[Any] = [*qkv, *(others or _NO_RESULTS)]
        if new is not None:
            given += new
        out, lse = given[_OUT], given[_LSE]
        if out is None:
            # The cheapest way to new memory is to ask for more of the same.
            out = given[_OUT] = torch.empty_like(qkv[0]) if self.out_like_q else self.new_out()
        if lse is None and self.new_lse is not None:
            lse = given[_LSE] = self.new_lse()
        addresses = [t.data_ptr() for t in self.pick(given)]
        driver, device = self.driver, self.device
        if self.new_scratch is not None:
            # From PyTorch's allocator: a CUDA graph owns its own, and streams do not share any.
            scratch = self.new_scratch()
            addresses.append(scratch.data_ptr())
        addresses.append(driver.stream(device))
        if driver.current_device() == device:
            self._launch(addresses)
        else:
            with driver.on(device):
                self._launch(addresses)
        return out, lse

    def _launch(self, addresses: list[int]) -> None:
        for place, number, word in self.fills:
            self.driver.fill(addresses[place], number, word, addresses[-1])
        for ready, patches in self.steps:
            ready.issue(patches, addresses)


def _scratch(launched: Launched) -> tuple[int, dict[str, int]]:
    """Bytes of all that nobody sees, and where each part of it begins."""
    size, begins = 0, {}
    for _, arguments, _ in launched:
        for name in _SCRATCH:
            t = getattr(arguments, name, None)
            if t is not None:
                begins[name] = size
                size += -(-t.nbytes // _ALIGN) * _ALIGN
    return size, begins


def _sources(kernel: Kernel, arguments: Any) -> list[str]:
    """The names of what a kernel's pointers point to, in its order."""
    names = (_name(arguments, found.path[1:]) for found in kernel.pointer_inputs)
    return [_SOURCES.get(name, name) for name in names]


def is_sparse(problem: AttentionProblem) -> bool:
    """Whether rows of the results may belong to no sequence: no kernel writes them."""
    return problem.has_seqused_q or problem.q_layout is Layout.VARLEN


def allocate(problem: AttentionProblem, tensors: AttentionTensors) -> None:
    """Give `tensors` the results that the caller did not."""
    q = tensors.q
    sparse = is_sparse(problem)
    if tensors.out is None:
        shape = problem.out_shape(q)
        tensors.out = q.new_zeros(shape) if sparse else q.new_empty(shape)
    if tensors.lse is None and problem.return_lse:
        tensors.lse = q.new_empty(problem.lse_shape(q), dtype=torch.float32)
    if sparse and tensors.lse is not None:
        tensors.lse.fill_(-torch.inf)


def _name(arguments: Any, path: tuple[int, ...]) -> str:
    """The name of the field at `path` of nested named tuples."""
    *outer, last = path
    for index in outer:
        arguments = arguments[index]
    return arguments._fields[last]
