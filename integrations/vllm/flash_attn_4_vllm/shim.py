"""For code that puts a function in the place of vLLM's own FlashAttention-4."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .kernel import kernel


def flash_attn_fwd(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> tuple:
    """The kernel under the contract of vllm.vllm_flash_attn.cute.interface._flash_attn_fwd.

    Args:
        q, k, v: as there; float8_e4m3fn k and v go with q in half precision.
        arguments: its keyword arguments. q_descale and output_scale have no meaning here.

    Returns:
        (out, lse, None, None). vLLM ignores the last two.

    Raises:
        NotImplementedError: an argument that the kernel does not have is given.
    """
    # Says that k and v are fp8 and q is not, which the dtypes say too.
    arguments.pop("fp8_kv_dequant", None)
    out, lse = kernel()._flash_attn_fwd(q, k, v, **arguments)
    return out, lse, None, None
