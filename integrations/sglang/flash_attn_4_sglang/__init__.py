"""flash-attn-4 from the Kernels Hub behind SGLang's attention backend fa4.

SGLang finds `register` by its entry point `sglang.srt.plugins`. The backend itself, its metadata
and its CUDA graphs stay SGLang's; the function that it calls to attend becomes this kernel's.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

DEFAULT_REPO = "flash-attn-4-org/flash-attn-4"
VERSION = 1  # of the kernel's interface, a branch v1 on the Hub
# Every call of the backend fa4 ends here; flash_attn_with_kvcache beside it calls it too.
TARGET = "sglang.kernels.ops.attention.flash_attention_v4.flash_attn_varlen_func"
# Arguments of SGLang's function with other names here, and those that mean nothing here.
RENAMED = {"sinks": "s_aux", "learnable_sink": "s_aux", "return_softmax_lse": "return_lse"}
POSITIONAL = ("cu_seqlens_q", "cu_seqlens_k")  # as far as SGLang's dispatcher passes any
LEFT_TO_SGLANG = ("qv", "q_descale", "sfq", "sfk", "sfv", "rel_bias")
MEANINGLESS = ("rel_bias_prep_cache",)  # nothing without rel_bias
MAX_HEAD_DIM = 256

logger = logging.getLogger("sglang.flash_attn_4")


def register() -> None:
    """Hook the kernel around SGLang's own FlashAttention-4."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(TARGET, attend, HookType.AROUND)


@functools.cache
def kernel() -> ModuleType:
    """What FLASH_ATTN_4_REPO and FLASH_ATTN_4_REVISION name; by default the newest version 1."""
    from kernels import get_kernel

    repo = os.environ.get("FLASH_ATTN_4_REPO", DEFAULT_REPO)
    revision = os.environ.get("FLASH_ATTN_4_REVISION")
    which: dict[str, Any] = {"revision": revision} if revision else {"version": VERSION}
    # Who installs this plugin has chosen to run the repository's code.
    loaded = get_kernel(repo, trust_remote_code=True, **which)
    logger.info("%s: %s", repo, loaded.describe())
    return loaded


def attend(original: Callable, q: Any, k: Any, v: Any, *positional: Any, **named: Any) -> Any:
    """SGLang's flash_attn_varlen_func, by the kernel where it can, else by SGLang itself.

    Left to SGLang, with one line in the log for each reason: MLA (qv), MXFP8 (sfq, sfk, sfv),
    quantised queries, float8 keys or values without factors, relative biases, head dimensions above
    256 or of no multiple of 8.

    Returns:
        out, or (out, lse) with return_softmax_lse.
    """
    if len(positional) <= len(POSITIONAL):
        named |= dict(zip(POSITIONAL, positional, strict=False))
        positional = ()
        reason = _not_ours(q, k, v, named)
    else:
        reason = f"{len(positional)} positional arguments behind q, k and v"
    if reason is not None:
        _say_once(reason)
        return original(q, k, v, *positional, **named)
    given = {name: value for name, value in named.items() if value is not None}
    for name in (*LEFT_TO_SGLANG, *MEANINGLESS):
        given.pop(name, None)
    for theirs, ours in RENAMED.items():
        if theirs in given:
            given[ours] = given.pop(theirs)
    for name in ("k_descale", "v_descale"):
        if name in given and "float8" not in str(k.dtype):
            del given[name]  # SGLang passes them with every cache
    return kernel().flash_attn_varlen_func(q, k, v, **given)


def _not_ours(q: Any, k: Any, v: Any, named: dict[str, Any]) -> str | None:
    for name in LEFT_TO_SGLANG:
        if named.get(name) is not None:
            return name
    if "16" not in str(q.dtype) and q.device.type == "cuda":
        return f"queries of {q.dtype}"
    for name, tensor in (("k", k), ("v", v)):
        # Without its factor a cache is not what SGLang stored: of a prefill by fa4 it passes none.
        if "float8" in str(tensor.dtype) and named.get(f"{name}_descale") is None:
            return f"{name} of {tensor.dtype} without {name}_descale"
    for dim in (q.shape[-1], v.shape[-1]):
        if dim % 8 or dim > MAX_HEAD_DIM:
            return f"head_dim {dim}"
    return None


@functools.cache
def _say_once(reason: str) -> None:
    logger.warning("flash-attn-4 leaves calls with %s to SGLang's own FlashAttention-4", reason)
