"""Integer arithmetic of fixed width as LLVM defines it; values are kept unsigned.

Operations are text, Python expressions of their operands' names: so a whole program becomes one
function, see `program`, which takes a tenth of the time that a call for each step takes.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any


def signed(value: int, width: int) -> int:
    """The two's complement number that `width` bits hold."""
    return value - (1 << width) if value >> (width - 1) else value


def ceil_log2(value: int) -> int:
    """The least s with 2^s >= value."""
    return (value - 1).bit_length()


def divide(x: int, y: int) -> int:
    """Division towards zero."""
    quotient = abs(x) // abs(y)
    return quotient if (x < 0) == (y < 0) else -quotient


# By name, of operands a and b, or x and y where they are read as signed.
_ARITHMETIC = {
    "add": "a + b",
    "sub": "a - b",
    "mul": "a * b",
    "udiv": "a // b",
    "urem": "a % b",
    "sdiv": "divide(x, y)",
    "srem": "x - y * divide(x, y)",
    "and": "a & b",
    "or": "a | b",
    "xor": "a ^ b",
    "shl": "a << b",
    "lshr": "a >> b",
    "ashr": "x >> b",
    "smin": "min(x, y)",
    "smax": "max(x, y)",
    "umin": "min(a, b)",
    "umax": "max(a, b)",
}
_COMPARISONS = {
    "eq": "a == b",
    "ne": "a != b",
    "ult": "a < b",
    "ule": "a <= b",
    "ugt": "a > b",
    "uge": "a >= b",
    "slt": "x < y",
    "sle": "x <= y",
    "sgt": "x > y",
    "sge": "x >= y",
}
_CONVERSIONS = {
    "zext": "a",
    "sext": "x",
    "trunc": "a",
    "abs": "abs(x)",
    "ceil_log2": "ceil_log2(a)",
}
_SELECT = {"select": "b if a else c"}
_TEXTS = _ARITHMETIC | _COMPARISONS | _CONVERSIONS | _SELECT
NAMES = frozenset(_TEXTS)
# Results of operands that are in range are in range.
_CLOSED = frozenset(("udiv", "urem", "and", "or", "xor", "lshr", "umin", "umax", "zext", "select"))
_LETTER = re.compile(r"\b[abcxy]\b")
NAMESPACE: dict[str, Any] = {"divide": divide, "ceil_log2": ceil_log2}  # what expressions call


def expression(name: str, width: int, to: int, operands: Sequence[str]) -> str:
    """`name` of operands of `width` bits, with a result of `to` bits, in Python.

    An operand is a name or a number.
    """
    meaning = dict(zip("abc", operands, strict=False))
    for letter, operand in zip("xy", operands, strict=False):
        meaning[letter] = f"({operand} - {1 << width} if {operand} >> {width - 1} else {operand})"
    text = _LETTER.sub(lambda found: meaning[found[0]], _TEXTS[name])
    if name in _COMPARISONS:
        return f"int({text})"
    return text if name in _CLOSED and to >= width else f"({text}) & {(1 << to) - 1}"


def operation(name: str, width: int, to: int) -> Callable[..., int]:
    """The function `name` of operands of `width` bits, with a result of `to` bits."""
    operands = "abc" if name in _SELECT else "a" if name in _CONVERSIONS else "ab"
    text = expression(name, width, to, operands)
    return eval(f"lambda {', '.join(operands)}: {text}", dict(NAMESPACE))
