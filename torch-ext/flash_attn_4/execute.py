"""Validate, allocate, and hand one call to the variant that runs on its device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import cpu
from .flash_attn4_cute.cache_update import (
    CacheUpdate,
    check_cache_update,
    names_of_keys,
    tensors_of,
)
from .flash_attn4_cute.checks import refuse
from .flash_attn4_cute.likeness import Likeness
from .flash_attn4_cute.overlap import check_apart
from .flash_attn4_cute.problem import (
    AttentionOptions,
    AttentionProblem,
    AttentionTensors,
    Full,
    band_of,
    numbered,
    others_of,
)
from .flash_attn4_cute.repeat import Others, Repeat, key_of
from .flash_attn4_cute.results import allocate, has_rows_of_no_sequence
from .flash_attn4_cute.values import check_values
from .flash_attn4_cute.watchers import is_only_memory


def attend(
    tensors: AttentionTensors,
    options: AttentionOptions,
    update: CacheUpdate | None = None,
    key: tuple | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of one call; lse is None unless asked for.

    With an `update`, first write its keys and values into the cache, then attend to all of it.
    Everything is checked before anything is written. What was launched is remembered under `key`.
    """
    problem = checked(tensors, options, update)
    variant = _variant(problem)
    prepared = variant.prepare(problem, tensors, update)
    launched, clears = [], has_rows_of_no_sequence(tensors)
    new_lse = tensors.lse is None and problem.return_lse
    cleared = clears and tensors.out is None, clears and new_lse
    allocate(problem, tensors)
    if update is not None:
        along = not isinstance(band_of(problem.mask), Full)
        launched.append(variant.append(update, tensors, along, prepared))
    launched.append(variant.forward(problem, tensors, prepared))
    if key is not None:
        _remember(key, Repeat.of(problem, launched, cleared))
    assert tensors.out is not None
    return tensors.out, tensors.lse


def checked(
    tensors: AttentionTensors, options: AttentionOptions, update: CacheUpdate | None
) -> AttentionProblem:
    """The problem that a call poses, if its arguments agree."""
    problem = AttentionProblem.from_tensors(tensors, options)
    check_apart(tensors, names_of_keys(update))
    if update is not None:
        check_cache_update(update, tensors)
    return problem


def explained(
    tensors: AttentionTensors, options: AttentionOptions, update: CacheUpdate | None
) -> str:
    """What `attend` would run, or raises what it would raise; nothing is written."""
    problem = checked(tensors, options, update)
    return _variant(problem).explain(problem, tensors, update)


class Repeats(dict[tuple, Repeat]):
    """By `repeat.key_of`; the last one of each kind also by `repeat.kind_of`."""

    def __init__(self) -> None:
        self.last: dict[Any, tuple[Likeness, Repeat]] = {}

    def again(
        self, key: tuple | None, kind: Any, qkv: tuple[Tensor, Tensor, Tensor], others: Others
    ) -> tuple[Tensor, Tensor | None] | None:
        """(out, lse) if the call is known by its key; it is the last of its kind then."""
        known = None if key is None else self.get(key)
        if known is None:
            return None
        tensors = qkv if others is None else qkv + others
        if known.likeness is None or not known.likeness.holds(tensors):
            # Strides that reach no address differ, or something must see more than memory.
            if not is_only_memory(tensors):
                return None
            known.likeness = Likeness.of(tensors)
        found = known.again(qkv, others)
        if found is not None and known.likeness is not None:
            self.last[kind] = known.likeness, known
        return found

    def clear(self) -> None:
        super().clear()
        self.last.clear()


repeats = Repeats()
_MAX_REPEATS = 4096


def _remember(key: tuple, repeat: Repeat | None) -> None:
    if repeat is not None:
        if len(repeats) >= _MAX_REPEATS:
            repeats.clear()
        repeats[key] = repeat


def attend_again(
    tensors: AttentionTensors, options: AttentionOptions, update: CacheUpdate | None = None
) -> tuple[Tensor, Tensor | None]:
    """`attend`, the short way if such a call was made before, known by its canonical options."""
    qkv, others = (tensors.q, tensors.k, tensors.v), others_of(tensors)
    interleaved = None
    if update is not None:
        others, interleaved = (*others, *tensors_of(update)), update.rotary_interleaved
    key, number = None, numbered(options)
    if number and tensors.aux_tensors is None and tensors.blocks is None:
        key = key_of(number, options.max_seqlen_k, qkv, others, interleaved)
    known = None if key is None else repeats.get(key)
    found = None if known is None else known.again(qkv, others)
    return attend(tensors, options, update, key) if found is None else found


def differentiate(
    tensors: AttentionTensors,
    options: AttentionOptions,
    results: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, dsink) of a call from its results (out, lse) and their gradients."""
    problem = AttentionProblem.from_tensors(tensors, options)
    if problem.device.type != "cpu":
        raise refuse(
            NotImplementedError,
            "requires_grad",
            True,
            f"there is no backward pass on {problem.device}",
            "Call under torch.no_grad(), or move the tensors to the CPU",
        )
    tensors.out, tensors.lse = results
    return cpu.backward(problem, tensors, *gradients)


def has_kernels(device: torch.device) -> bool:
    """Whether partial results on `device` are merged by a kernel."""
    return device.type == "cuda"


def merge(
    outs: tuple[Tensor, ...], lses: tuple[Tensor, ...], out: Tensor, lse: Tensor
) -> tuple | None:
    """Merge partial results on a CUDA device; returns what was launched, see combine_plan."""
    from .flash_attn4_cute import combine_plan

    return combine_plan.merge(outs, lses, out, lse)


def explained_merge(outs: tuple[Tensor, ...], out: Tensor | None, dtype: torch.dtype) -> str:
    """What `merge` would run, or raises what it would raise; nothing is written."""
    from .flash_attn4_cute import combine_plan

    return combine_plan.explain(outs, out, dtype)


@dataclass(frozen=True, slots=True)
class _Variant:
    """What carries out a call on one kind of device.

    `prepare` refuses what the others cannot do, and finds all that they need, before anything is
    written; they get its answer. `explain` refuses the same, and says what would run. `append`
    carries out an update and makes the tensors ask about the result. `forward` writes tensors.out
    and tensors.lse. Both return what was launched, if anything was.
    """

    prepare: Callable[[AttentionProblem, AttentionTensors, CacheUpdate | None], Any]
    explain: Callable[[AttentionProblem, AttentionTensors, CacheUpdate | None], str]
    append: Callable[[CacheUpdate, AttentionTensors, bool, Any], Any]
    forward: Callable[[AttentionProblem, AttentionTensors, Any], tuple | None]


def _explained_on_cpu(
    problem: AttentionProblem, tensors: AttentionTensors, update: CacheUpdate | None
) -> str:
    check_values(problem, tensors)
    first = "" if update is None else "append: PyTorch operations, in place\n"
    return first + cpu.explain(problem)


_CPU = _Variant(
    lambda problem, tensors, update: check_values(problem, tensors),
    _explained_on_cpu,
    lambda update, tensors, along, _: cpu.append_kv(update, tensors, along),
    lambda problem, tensors, _: cpu.forward(problem, tensors),
)


def _variant(problem: AttentionProblem) -> _Variant:
    if problem.device.type == "cpu":
        return _CPU
    if problem.device.type != "cuda":
        raise refuse(
            NotImplementedError,
            "q.device",
            problem.device,
            "there are kernels for cpu and cuda tensors",
            "Move q, k and v to one of them",
        )
    return _cuda()


@functools.cache
def _cuda() -> _Variant:
    """The launchers; importing them needs no cutlass, the first launch does."""
    from .flash_attn4_cute import append_plan, launch

    return _Variant(
        launch.prepare,
        launch.explain,
        lambda update, tensors, along, prepared: append_plan.append(
            update, tensors, along, prepared.append
        ),
        launch.forward,
    )


if torch.version.cuda is not None:
    _cuda()  # now: making its dataclasses takes 15 ms, for which a first call need not wait
