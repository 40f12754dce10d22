"""Whether kernels can be compiled in this process."""

from __future__ import annotations

import importlib.util
import os

SWITCH = "FLASH_ATTN_4_JIT"


def is_forbidden() -> bool:
    """Whether the user forbids it."""
    return os.environ.get(SWITCH, "1") == "0"


def obstacle() -> str | None:
    """Why no kernel can be compiled here, for people; None if one can."""
    if is_forbidden():
        return f"{SWITCH}=0 forbids compiling"
    try:
        found = importlib.util.find_spec("cutlass") is not None
    except ValueError:  # it is imported, and does not say from where
        found = True
    return None if found else "nvidia-cutlass-dsl is not installed"


def others() -> str:
    """What becomes of calls whose kernel is not precompiled, for people."""
    why = obstacle()
    if why is None:
        return "compiled at the first call"
    return f"an error unless the cache on disk holds it, because {why}"
