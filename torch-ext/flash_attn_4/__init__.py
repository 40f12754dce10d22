"""flash-attn-4: exact attention for NVIDIA Blackwell, and in plain PyTorch elsewhere."""

from .in_transformers import use_in_transformers
from .interface import _flash_attn_fwd as _flash_attn_fwd
from .interface import (
    flash_attn_combine,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    get_scheduler_metadata,
    merge_attention_states,
)
from .report import describe, explain

__all__ = [
    "describe",
    "explain",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
    "merge_attention_states",
    "use_in_transformers",
]
