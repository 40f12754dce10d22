"""What vLLM asks before it chooses this backend: cards, dtypes, head sizes, features."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionType, MultipleOf

from .impl import FlashAttn4Impl
from .metadata import FlashAttn4MetadataBuilder

# Compute capabilities that the kernel repository has variants for, by its own rule (device.py
# there): 9.0 alone, and all of a family; 10.1 is the first name of 11.0, which is of another one.
CARDS = frozenset({(9, 0)})
FAMILIES = frozenset({10, 12})
REFUSED = frozenset({(10, 1)})
CACHE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
MAX_HEAD_SIZE = 256


class FlashAttn4Backend(AttentionBackend):
    """Keys and values in vLLM's own layout, pages of any multiple of 16 tokens."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = [
        "auto",
        *CACHE_DTYPES,
        "fp8",
        "fp8_e4m3",
    ]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # vLLM looks it up in its AttentionBackendEnum

    @staticmethod
    def get_impl_cls() -> type[FlashAttn4Impl]:
        return FlashAttn4Impl

    @staticmethod
    def get_builder_cls() -> type[FlashAttn4MetadataBuilder]:
        return FlashAttn4MetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % 8 == 0 and 0 < head_size <= MAX_HEAD_SIZE

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True  # drafts that are made at once; a window is as wide to the right then

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type in (AttentionType.DECODER, AttentionType.ENCODER_ONLY)

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        card = (capability.major, capability.minor)
        return card in CARDS or (capability.major in FAMILIES and card not in REFUSED)

    @classmethod
    def supports_combination(
        cls, head_size: int, dtype: torch.dtype, kv_cache_dtype: str | None, *rest: Any, **more: Any
    ) -> str | None:
        if kv_cache_dtype is None:
            return None
        if kv_cache_dtype.startswith("fp8") and head_size % 16:
            return f"an fp8 KV cache needs a head_size that is a multiple of 16, not {head_size}"
        if CACHE_DTYPES.get(kv_cache_dtype, dtype) is not dtype:
            return f"a KV cache of {kv_cache_dtype} needs a model of that dtype, not {dtype}"
        return None
