"""What a kernel's machine code depends on among the sources: the files that tracing it reads."""

from __future__ import annotations

import ast
import functools
import hashlib
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]
# Read whatever is compiled. Of these the text counts, not what they import: they choose among
# kernels, and what they choose by is in the key.
COMMON = ("compiler.py", "signature.py", "launcher/translate.py")
# What defines keys and their parts. Tracing reads their properties too, so the text counts, and it
# alone: these modules import the host's code.
KEYS = ("append_plan.py", "combine_plan.py", "kernel_keys.py", "rules.py")
ATTENTION = (*COMMON, "kernel_keys.py", "rules.py")


def sources_of(key: Any) -> list[Path]:
    """The files that decide what `key` compiles to, in a fixed order."""
    kernel = type(key).__name__
    if kernel == "AppendKey":
        return list(_closure("append_kv.py", COMMON))
    if kernel == "CombineKey":
        return list(_closure("combine.py", (*COMMON, "combine_plan.py", "decode_signature.py")))
    if kernel == "DecodeKey":
        return list(_closure(f"{key.family}/decode.py", (*ATTENTION, "decode_signature.py")))
    return list(_closure(f"{key.family}/forward.py", ATTENTION))


@functools.cache
def _closure(root: str, common: tuple[str, ...]) -> tuple[Path, ...]:
    found: set[Path] = set()
    ahead = [PACKAGE / root for root in (root, "launcher/translate.py")]
    while ahead:
        path = ahead.pop()
        if path not in found:
            found.add(path)
            ahead.extend([] if path.name in KEYS else imported(path))
    return tuple(sorted(found | {PACKAGE / name for name in common}))


def imported(path: Path) -> list[Path]:
    """The files of the package that a file imports, wherever in it."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
        # `from . import x` names a module or what __init__ holds; `from .x import y` may do both.
        candidates = [base.with_suffix(".py") if node.module else base / "__init__.py"]
        candidates += [base / "__init__.py", *(base / f"{a.name}.py" for a in node.names)]
        found += [candidate for candidate in candidates if candidate.is_file()]
    return found


def digest(key: Any) -> str:
    """One number for all of them."""
    return _digest(tuple(sources_of(key)))


@functools.cache
def _digest(paths: tuple[Path, ...]) -> str:
    whole = hashlib.sha256()
    for path in paths:
        whole.update(str(path.relative_to(PACKAGE)).encode())
        whole.update(hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()
