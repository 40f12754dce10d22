"""How a tensor core of sm_90 adds the products of one step: bit for bit what an H200 returns.

With e the largest exponent among the products and C, each term is cut (toward zero) to a multiple
of 2^(e - 25); their sum, which is then exact, is cut to fp32. A product's exponent is the sum of
its factors' exponents, so its significand may reach 4; denormals have the smallest exponent.
16 products make a step. Found by fitting; `tests/golden` holds the results it was fitted to.
"""

import numpy as np

KNOWN = ("f16", "bf16")
GUARD = 25
_NONE = -(1 << 20)  # the exponent of zero


def exponents(x: np.ndarray, smallest: int) -> np.ndarray:
    """Exponents of float64 values, of which zero has none."""
    found = np.maximum(np.frexp(x)[1] - 1, smallest)
    return np.where(x == 0, _NONE, found)


def step(a: np.ndarray, b: np.ndarray, c: np.ndarray, smallest: int) -> np.ndarray:
    """a @ b + c in float32, for (…, m, 16), (…, 16, n) and (…, m, n) in float64.

    `smallest` is the exponent of denormals in the factors' type.
    """
    depth = a.shape[-1]
    ea, eb = exponents(a, smallest), exponents(b, smallest)
    top = exponents(c, -126)
    for k in range(depth):
        np.maximum(top, ea[..., :, k, None] + eb[..., None, k, :], out=top)
    scale = np.ldexp(1.0, GUARD - np.maximum(top, -600))
    total = np.trunc(c * scale)
    for k in range(depth):
        total = total + np.trunc(a[..., :, k, None] * b[..., None, k, :] * scale)
    return toward_zero(total / scale)


def toward_zero(x: np.ndarray) -> np.ndarray:
    """float64 as float32, cut; beyond the largest finite value infinite."""
    near = x.astype(np.float32)
    beyond = (np.abs(near.astype(np.float64)) > np.abs(x)) & np.isfinite(near)
    return np.where(beyond, np.nextafter(near, np.float32(0)), near)
