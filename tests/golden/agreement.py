"""How a program's results on a card and in the emulator must agree.

bits                 every word is equal
f32, bf16x2, f16x2   every bit is equal; NaN need only be NaN: what IEEE 754 defines
bf16x2 N, f16x2 N    halves at most N representable values apart
relative X           f32, and the difference is at most X times the card's result
absolute X           f32, and the difference is at most X
lg2                  f32, relative or absolute 2^-22
accumulated          sums of mma.sync and wgmma: f32
fp8                  sums of fp8 products, which cards cut to about 13 bits: f32, and the difference
                     is at most 2^-10 times the largest result
"""

from collections.abc import Callable

import numpy as np


def _as_float(halves: np.ndarray, kind: str) -> np.ndarray:
    if kind.startswith("bf16"):
        return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return halves.view(np.float16).astype(np.float32)


def _same_bits(card: np.ndarray, emulated: np.ndarray, values: Callable) -> np.ndarray:
    both_nan = np.isnan(values(card)) & np.isnan(values(emulated))
    return (card == emulated) | both_nan


def ordinal(halves: np.ndarray) -> np.ndarray:
    """Position among representable values; both zeros are at 0."""
    bits = halves.astype(np.int64)
    return np.where(bits & 0x8000, -(bits & 0x7FFF), bits)


def _near(card: np.ndarray, emulated: np.ndarray, bound: Callable) -> np.ndarray:
    x, y = card.view(np.float32), emulated.view(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        close = np.abs(x.astype(np.float64) - y) <= bound(np.abs(x.astype(np.float64)))
    return close | (x == y) | (np.isnan(x) & np.isnan(y))


SMALLEST = 2.0**-149  # one denormal more or less


def agree(rule: str, card: np.ndarray, emulated: np.ndarray) -> np.ndarray:
    """For each word (or half) whether the results agree."""
    kind, _, number = rule.partition(" ")
    if kind == "bits":
        return card == emulated
    if kind in ("f32", "accumulated"):
        return _same_bits(card, emulated, lambda words: words.view(np.float32))
    if kind in ("bf16x2", "f16x2"):
        x, y = card.view(np.uint16), emulated.view(np.uint16)
        same = _same_bits(x, y, lambda halves: _as_float(halves, kind))
        return same | (np.abs(ordinal(x) - ordinal(y)) <= int(number)) if number else same
    if kind == "relative":
        share = 2.0 ** float(number.removeprefix("2^"))
        return _near(card, emulated, lambda size: np.maximum(share * size, SMALLEST))
    if kind == "absolute":
        most = 2.0 ** float(number.removeprefix("2^"))
        return _near(card, emulated, lambda size: np.full_like(size, most))
    if kind == "fp8":
        largest = float(np.abs(card.view(np.float32)).max())
        return _near(card, emulated, lambda size: np.full_like(size, 2.0**-10 * largest))
    assert kind == "lg2", rule
    return _near(card, emulated, lambda size: np.maximum(2.0**-22 * size, 2.0**-22))
