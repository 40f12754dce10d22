"""Kernels that came with the package: machine code for each family of cards.

    <package>/variants/<target>/<digest>.kernel     see launcher.entry
    <package>/variants/<target>/index.json          what there is, for people and tests: no call
                                                    reads it

The digest covers the kernel's key only: the sources are those that the package was built from.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from . import jit
from .launcher import entry
from .launcher.kernel import Kernel

logger = logging.getLogger("flash_attn_4")

INDEX = "index.json"


def folder() -> Path:
    """Where the variants lie, if there are any."""
    return Path(__file__).parents[1] / "variants"


def describe(parts: Collection[tuple[str, str]]) -> str:
    """What the package brings for a card, for people.

    `parts` are the (target, family of kernels) that the card takes.
    """
    targets = sorted({target for target, _ in parts})
    try:
        number = sum(_number(target, parts) for target in targets)
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f"how many kernels are precompiled is not known: {error!r} in reading {INDEX}"
    else:
        found = f"{number or 'no'} kernels are precompiled for it"
        found += f", in {' and '.join(targets)}" if number else ""
    return f"{found}; any other is {jit.others()}"


def _number(target: str, parts: Collection[tuple[str, str]]) -> int:
    """How many kernels of `parts` there are for a target."""
    index = folder() / target / INDEX
    if not index.parent.exists():
        return 0
    files = set(os.listdir(index.parent))
    rows = json.loads(index.read_text(encoding="utf-8"))["kernels"]
    return sum(row["file"] in files and (target, row["family"]) in parts for row in rows)


def path_of(key: Any) -> Path:
    """The file for `key`, whether or not it exists."""
    return folder() / key.variant / entry.file_name(repr(key))


def load(key: Any) -> Kernel | None:
    """The packaged kernel for `key`, or None."""
    path = path_of(key)
    try:
        return entry.unpack(path.read_bytes(), key)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s of the package is not usable: %s", path, error)
        return None
