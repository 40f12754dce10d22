"""What a call costs, for torch.utils.flop_counter: two operations for each product of its matrices.

As PyTorch counts its own attention, a query is paired with every key of its sequence, seen or not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

formulas: dict[Any, Callable[..., int]] = {}  # by operator


def tell_counters() -> None:
    """Give the formulas to all FlopCounterModes that are active, and to later ones.

    Their module is not imported for that, which takes as long as two first calls.
    """
    module = sys.modules.get("torch.utils.flop_counter")
    if module is not None:
        registries = [module.flop_registry]
        for mode in _get_current_dispatch_mode_stack():
            registries.append(getattr(getattr(mode, "counter", mode), "flop_registry", {}))
        for registry in registries:
            for operator, formula in formulas.items():
                registry.setdefault(operator, formula)  # a user may count by his own


def forward(*call: Any, **_: Any) -> int:
    """Of (q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, page_table, ...)."""
    d, d_v = call[0].shape[-1], call[2].shape[-1]
    return 2 * _pairs(call) * (d + d_v)  # S = Q K', O = P V


def backward(*arguments: Any, **_: Any) -> int:
    """Of (dout, dlse, out, lse, q, k, v, ...)."""
    call = arguments[4:]
    d, d_v = call[0].shape[-1], call[2].shape[-1]
    return 2 * _pairs(call) * (3 * d + 2 * d_v)  # S and dP = dO V' again, dV, dQ and dK


def forward_out(out: Tensor, lse: Tensor | None, *call: Any, **_: Any) -> int:
    """As `forward`."""
    return forward(*call)


def with_kvcache(out: Tensor, lse: Tensor | None, *arguments: Any, **_: Any) -> int:
    """Of (k, v, cache_seqlens, cu_seqlens_k_new, three of the rotation, q, k_cache, ...)."""
    new, starts, call = arguments[0], arguments[3], arguments[7:]
    d, d_v = call[0].shape[-1], call[2].shape[-1]
    return 2 * _pairs(call, _lengths(starts, None, new)) * (d + d_v)


def _pairs(call: tuple, new: list[int] | None = None) -> int:
    """Pairs of a query and a key, over all sequences and heads."""
    q, k = call[:2]
    cu_q, cu_k, used_q, used_k, table = call[3:8]
    queries = _lengths(cu_q, used_q, q)
    if _is_known(used_k) or cu_k is not None:
        keys = _lengths(cu_k, used_k, k)
    else:  # a cache may have other rows than there are sequences
        longest = k.shape[1] if table is None else table.shape[1] * k.shape[1]
        keys = [longest] * len(queries)
    added = new or [0] * len(queries)
    pairs = sum(max(n, 0) * (max(m, 0) + a) for n, m, a in zip(queries, keys, added, strict=True))
    return pairs * q.shape[-2]


def _lengths(starts: Tensor | None, used: Tensor | None, t: Tensor) -> list[int]:
    """Of all sequences; bounds where the numbers are not known, for fake tensors have none."""
    if used is not None and _is_known(used):
        return used.tolist()
    if starts is None:
        return [t.shape[1]] * t.shape[0]
    if _is_known(starts):
        return starts.diff().tolist()
    return [t.shape[0], *[0] * starts.shape[0]][: starts.shape[0] - 1]  # no more than all of them


def _is_known(t: Tensor | None) -> bool:
    return type(t) is Tensor and t.device.type != "meta"
