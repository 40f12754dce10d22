"""Integer arithmetic of fixed width as LLVM defines it; values are kept unsigned."""

from collections.abc import Callable

Binary = Callable[[int, int], int]


def signed(value: int, width: int) -> int:
    """The two's complement number that `width` bits hold."""
    return value - (1 << width) if value >> (width - 1) else value


def ceil_log2(value: int) -> int:
    """The least s with 2^s >= value."""
    return (value - 1).bit_length()


def _divide(a: int, b: int, width: int) -> int:
    """Signed division towards zero."""
    x, y = signed(a, width), signed(b, width)
    quotient = abs(x) // abs(y)
    return quotient if (x < 0) == (y < 0) else -quotient


# By name: (a, b, width) -> a number that is then cut to the width.
_ARITHMETIC: dict[str, Callable[[int, int, int], int]] = {
    "add": lambda a, b, w: a + b,
    "sub": lambda a, b, w: a - b,
    "mul": lambda a, b, w: a * b,
    "udiv": lambda a, b, w: a // b,
    "urem": lambda a, b, w: a % b,
    "sdiv": _divide,
    "srem": lambda a, b, w: signed(a, w) - signed(b, w) * _divide(a, b, w),
    "and": lambda a, b, w: a & b,
    "or": lambda a, b, w: a | b,
    "xor": lambda a, b, w: a ^ b,
    "shl": lambda a, b, w: a << b,
    "lshr": lambda a, b, w: a >> b,
    "ashr": lambda a, b, w: signed(a, w) >> b,
    "smin": lambda a, b, w: min(signed(a, w), signed(b, w)),
    "smax": lambda a, b, w: max(signed(a, w), signed(b, w)),
    "umin": lambda a, b, w: min(a, b),
    "umax": lambda a, b, w: max(a, b),
}
_COMPARISONS: dict[str, Callable[[int, int, int], bool]] = {
    "eq": lambda a, b, w: a == b,
    "ne": lambda a, b, w: a != b,
    "ult": lambda a, b, w: a < b,
    "ule": lambda a, b, w: a <= b,
    "ugt": lambda a, b, w: a > b,
    "uge": lambda a, b, w: a >= b,
    "slt": lambda a, b, w: signed(a, w) < signed(b, w),
    "sle": lambda a, b, w: signed(a, w) <= signed(b, w),
    "sgt": lambda a, b, w: signed(a, w) > signed(b, w),
    "sge": lambda a, b, w: signed(a, w) >= signed(b, w),
}
# (a, operand width, result width) -> a number that is then cut to the result width.
_CONVERSIONS: dict[str, Callable[[int, int, int], int]] = {
    "zext": lambda a, w, to: a,
    "sext": lambda a, w, to: signed(a, w),
    "trunc": lambda a, w, to: a,
    "abs": lambda a, w, to: abs(signed(a, w)),
    "ceil_log2": lambda a, w, to: ceil_log2(a),
}
NAMES = frozenset(_ARITHMETIC) | frozenset(_COMPARISONS) | frozenset(_CONVERSIONS) | {"select"}


def operation(name: str, width: int, to: int) -> Callable[..., int]:
    """The function `name` of operands of `width` bits, with a result of `to` bits."""
    if name == "select":
        return lambda condition, a, b: a if condition else b
    mask = (1 << to) - 1
    if name in _CONVERSIONS:
        convert = _CONVERSIONS[name]
        return lambda a: convert(a, width, to) & mask
    if name in _COMPARISONS:
        compare = _COMPARISONS[name]
        return lambda a, b: int(compare(a, b, width))
    compute = _ARITHMETIC[name]
    return lambda a, b: compute(a, b, width) & mask
