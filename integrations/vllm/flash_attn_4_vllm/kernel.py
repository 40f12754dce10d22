"""The kernel itself, loaded from the Hub once a process."""

from __future__ import annotations

import functools
import os
from types import ModuleType

DEFAULT_REPO = "flash-attn-4-org/flash-attn-4"
VERSION = 1  # of the kernel's interface, a branch v1 on the Hub


@functools.cache
def kernel() -> ModuleType:
    """The kernel that FLASH_ATTN_4_REPO and FLASH_ATTN_4_REVISION name; by default the newest v1.

    Raises:
        RuntimeError, ValueError, FileNotFoundError: what `kernels.get_kernel` says of a repository
            that it does not find, or that has no kernel for this machine.
    """
    from kernels import get_kernel
    from vllm.logger import init_logger

    repo = os.environ.get("FLASH_ATTN_4_REPO", DEFAULT_REPO)
    revision = os.environ.get("FLASH_ATTN_4_REVISION")
    # Who installs this plugin and selects the backend has chosen to run the repository's code.
    if revision:
        loaded = get_kernel(repo, revision=revision, trust_remote_code=True)
    else:
        loaded = get_kernel(repo, version=VERSION, trust_remote_code=True)
    # vLLM shows what is logged under its own name.
    init_logger("vllm.flash_attn_4").info("%s: %s", repo, loaded.describe())
    return loaded
