"""Which keys a query may see.

Positions are aligned at the bottom right: with sq queries and sk keys, query i stands on key
i + sk - sq, so the last query stands on the last key and one decode token sees the whole cache.
Query i sees key j if and only if

    i + sk - sq - left  <=  j  <=  i + sk - sq + right

where a bound of None does not limit. This is the convention of FlashAttention >= 2.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .checks import as_bool, as_int, check_function, refuse


@dataclass(frozen=True, slots=True)
class Full:
    """Every query sees every key."""


@dataclass(frozen=True, slots=True)
class Band:
    """A diagonal band: `left` keys before the query's own position and `right` after it."""

    left: int | None
    right: int | None


@dataclass(frozen=True, slots=True)
class Custom:
    """The keys of `band` that mask_mod(b, h, q_idx, kv_idx, seqlen_info, aux_tensors) admits."""

    mask_mod: Callable
    band: Band | Full  # no default: torch.compile of PyTorch 2.11 fails on one that is an object


MaskRule = Full | Band | Custom

FULL = Full()
CAUSAL = Band(None, 0)


def band_of(rule: MaskRule) -> Band | Full:
    """The part of `rule` that positions alone decide."""
    return rule.band if isinstance(rule, Custom) else rule


def make_mask_rule(causal: bool, window_size: Any, mask_mod: Callable | None = None) -> MaskRule:
    """Canonical rule for the ecosystem's `causal` and `window_size` arguments.

    Args:
        causal: no key right of the diagonal; combined with a window it is the intersection.
        window_size: None, or a pair (left, right) of integers >= 0 where None or -1 is unlimited.
        mask_mod: a further condition on the keys that are left, or None.

    Raises:
        TypeError: causal is not a bool, window_size is not a pair, or mask_mod is not callable.
        ValueError: a bound below -1.
    """
    left, right = (None, None) if window_size is None else _bounds(window_size)
    band = _band(as_bool("causal", causal), left, right)
    if mask_mod is None:
        return band
    check_function("mask_mod", mask_mod, "b, h, q_idx, kv_idx, seqlen_info, aux_tensors")
    return Custom(mask_mod, band)


def _band(causal: bool, left: int | None, right: int | None) -> Band | Full:
    if causal:
        return CAUSAL if left is None else Band(left, 0)
    return FULL if left is None and right is None else Band(left, right)


def _bounds(window_size: Any) -> tuple[int | None, int | None]:
    try:
        left, right = window_size
    except (TypeError, ValueError):
        raise refuse(
            TypeError,
            "window_size",
            repr(window_size),
            "must be a pair (left, right)",
            "Pass (left, right), with None or -1 for a side without a limit",
        ) from None
    return _bound(window_size, left), _bound(window_size, right)


def _bound(window_size: Any, value: Any) -> int | None:
    if value is None:
        return None
    value = as_int("window_size", value)
    if value == -1:
        return None
    if value < 0:
        raise refuse(
            ValueError,
            "window_size",
            tuple(window_size),
            "each side must be >= 0, or None or -1 for no limit",
            "Pass (left, right), for example (1023, 0) for the last 1024 keys",
        )
    return value
