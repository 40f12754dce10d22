"""Kernels that came with the package: machine code for each family of cards.

    <package>/variants/<target>/<digest>.kernel     see launcher.entry
    <package>/variants/<target>/index.json          what there is, for people and tests

The digest covers the kernel's key only: the sources are those that the package was built from.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from .launcher import entry
from .launcher.kernel import Kernel

logger = logging.getLogger("flash_attn_4")

INDEX = "index.json"


def folder() -> Path:
    """Where the variants lie, if there are any."""
    return Path(__file__).parents[1] / "variants"


def describe(target: str) -> str:
    """What the package brings for a target, for people."""
    number = sum(1 for _ in (folder() / target).glob(f"*{entry.SUFFIX}"))
    if not number:
        return f"no kernel is precompiled for {target}, each is compiled at its first call"
    return f"{number} kernels are precompiled for {target}, others are compiled at their first call"


def path_of(key: Any) -> Path:
    """The file for `key`, whether or not it exists."""
    return folder() / key.variant / entry.file_name(repr(key))


def holds(key: Any) -> bool:
    """Whether the package has a kernel for `key`."""
    return path_of(key).exists()


def load(key: Any) -> Kernel | None:
    """The packaged kernel for `key`, or None."""
    path = path_of(key)
    try:
        data = path.read_bytes()
    except OSError:
        return None
    try:
        return entry.unpack(data, key)
    except ValueError as error:
        logger.warning("%s of the package is not usable: %s", path, error)
        return None
