"""What the compiled attention kernels depend on: their keys.

What tracing reads of a key, fields and properties, decides what is compiled. So this file is part
of the digest of every attention kernel (see build.sources), and holds nothing that only chooses
among kernels: that is the plans'.
"""

from dataclasses import dataclass
from typing import Any

import torch

from .decode_tiles import DecodeConfig
from .problem import Layout
from .rules import PLAIN, BandRule, ScoreRule
from .sm100 import tiles as sm100_tiles
from .tiles import TileConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardKey:
    """Everything that a compiled forward kernel depends on.

    `merged_dim` is v's head dimension if keys are split, for the merge is compiled for it, else 0.
    """

    variant: str
    dtype: torch.dtype
    cfg: TileConfig | sm100_tiles.TileConfig
    rule: BandRule
    q_layout: Layout
    kv_layout: Layout
    has_seqused_q: bool
    has_seqused_k: bool
    has_lse: bool
    has_kv_batch_idx: bool = False
    has_leftpad: bool = False
    has_k_descale: bool = False
    has_v_descale: bool = False
    score: ScoreRule = PLAIN
    merged_dim: int = 0

    @property
    def has_fp8_kv(self) -> bool:
        """Whether K and V are e4m3: then tensors have two of their values in an element."""
        return isinstance(self.cfg, TileConfig) and self.cfg.kv_bytes == 1

    @property
    def counts_tiles(self) -> bool:
        """Whether CTAs take tiles from a counter: where sequences differ, on a card whose can."""
        return self.is_uneven and self.cfg.counts_tiles

    @property
    def is_uneven(self) -> bool:
        """Whether sequences may differ in length."""
        packed = self.q_layout is Layout.VARLEN or self.kv_layout is Layout.VARLEN
        return packed or self.has_seqused_q or self.has_seqused_k

    @property
    def family(self) -> str:
        """The kernels' architecture family: that of the tiles."""
        return self.cfg.family

    def trace(self) -> tuple:
        """The kernel and stand-ins for its arguments; see compiler.KernelKey."""
        from .signature import trace_forward

        return trace_forward(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeKey:
    """Everything that a compiled decode kernel depends on; with splits, its combine is in it.

    Of the page size only `box_n`, what it has in common with 64 keys, is compiled in.
    """

    variant: str
    dtype: torch.dtype
    cfg: DecodeConfig
    head_dim: int
    head_dim_v: int
    rule: Any
    q_layout: Layout
    kv_layout: Layout
    box_n: int | None
    is_split: bool
    has_seqused_q: bool
    has_seqused_k: bool
    has_kv_batch_idx: bool
    has_lse: bool
    has_leftpad: bool = False
    has_k_descale: bool = False
    has_v_descale: bool = False
    score: ScoreRule = PLAIN

    @property
    def family(self) -> str:
        """The kernels' architecture family: mma.sync, which every card has."""
        return "sm120"

    def trace(self) -> tuple:
        """The kernel and stand-ins for its arguments; see compiler.KernelKey."""
        from .decode_signature import trace_decode

        return trace_decode(self)
