"""flash-attn-4 from the Kernels Hub as an attention backend of vLLM.

vLLM finds `register` by its entry point `vllm.general_plugins` and calls it in every process.
Nothing else has to be imported or patched; README.md says how to select the backend.
"""

from __future__ import annotations

import os

BACKEND = "flash_attn_4_vllm.backend.FlashAttn4Backend"
# vLLM's own member for backends from outside. A member that a plugin adds has a name too, but
# cannot be sent to the engine's process, which reads its configuration before it loads plugins.
NAME = "CUSTOM"
REPLACES = "FLASH_ATTN_4_REPLACES"


def register() -> None:
    """Make the backend known to vLLM as CUSTOM, unless another plugin has done so with its own.

    The environment variable FLASH_ATTN_4_REPLACES may list backends of vLLM's, separated by commas,
    whose place it then takes: wherever vLLM would choose one of them, it runs this one.

    Raises:
        ValueError: FLASH_ATTN_4_REPLACES names what vLLM does not know.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if not AttentionBackendEnum[NAME].is_overridden():
        register_backend(AttentionBackendEnum[NAME], BACKEND)
    for name in filter(None, os.environ.get(REPLACES, "").split(",")):
        known = AttentionBackendEnum.__members__
        if name not in known:
            raise ValueError(
                f"{REPLACES}={name}: must name attention backends of this vLLM. "
                f"Use some of {', '.join(known)}."
            )
        register_backend(AttentionBackendEnum[name], BACKEND)
