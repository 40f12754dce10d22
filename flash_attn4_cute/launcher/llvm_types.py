"""Types of MLIR's LLVM dialect as the host code of launches uses them, with their layout in memory.

A type is the name of a scalar ("i32", "ptr"), or a list of types: a struct or an array.
"""

from __future__ import annotations

import re
from typing import Any

LlvmType = Any  # str | list[LlvmType]

_SCALAR_BYTES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "ptr": 8, "f32": 4, "f64": 8}
_TOKEN = re.compile(r"struct<\(|array<\d+ x |ptr(<\d+>)?|i\d+|f\d+|[>),]")


class Untranslatable(Exception):
    """Host code that does something which no Program expresses."""


def parse_type(text: str) -> LlvmType:
    """The type that `text` starts with."""
    found, _ = _parse(text.lstrip(" !"))
    return found


def _parse(text: str) -> tuple[LlvmType, str]:
    text = text.lstrip(" ,!")
    match = _TOKEN.match(text)
    if match is None:
        raise Untranslatable(f"no type: {text[:80]}")
    token, rest = match.group(), text[match.end() :]
    if token.startswith("struct"):
        members = []
        while not rest.lstrip().startswith(")>"):
            member, rest = _parse(rest)
            members.append(member)
        return members, rest.lstrip()[2:]
    if token.startswith("array"):
        element, rest = _parse(rest)
        return [element] * int(token.split()[0].removeprefix("array<")), rest.lstrip()[1:]
    return ("ptr" if token.startswith("ptr") else token), rest


def width_of(kind: LlvmType) -> int:
    """Bits of a scalar."""
    if not isinstance(kind, str) or kind not in _SCALAR_BYTES:
        raise Untranslatable(f"{kind} is no scalar of a known width")
    return 64 if kind == "ptr" else int(kind[1:])


def alignment(kind: LlvmType) -> int:
    """Bytes."""
    if isinstance(kind, str):
        return _SCALAR_BYTES[kind]
    return max((alignment(member) for member in kind), default=1)


def size_of(kind: LlvmType) -> int:
    """Bytes, with the padding at the end."""
    if isinstance(kind, str):
        return _SCALAR_BYTES[kind]
    return -(-_end(kind) // alignment(kind)) * alignment(kind)


def _end(members: list) -> int:
    at = 0
    for member in members:
        at = -(-at // alignment(member)) * alignment(member) + size_of(member)
    return at


def offset_of(members: list, index: int) -> int:
    """Where member `index` begins."""
    at = _end(members[:index])
    return -(-at // alignment(members[index])) * alignment(members[index])


def leaves(kind: LlvmType, at: int = 0) -> list[tuple[int, str]]:
    """The scalars of a type with their offsets, in order."""
    if isinstance(kind, str):
        return [(at, kind)]
    return [
        leaf for i, member in enumerate(kind) for leaf in leaves(member, at + offset_of(kind, i))
    ]
