"""Tile configurations of the decode kernel, as data."""

import math
from dataclasses import dataclass, replace

from .splits import Pace
from .tiles import BARRIER_BYTES, SMEM_LIMIT_SM90, SMEM_LIMIT_SM120, WARP_SIZE

M_ATOM = 16  # rows of one mma.sync.m16n8k16
STATS_BYTES_A_ROW = 8  # a warp's maximum and sum of one row, float32
STAGING_PAD = 8  # floats between rows of staged O, so that pairs of columns meet no bank twice


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig:
    """One configuration of the mma.sync decode kernel.

    A CTA holds `rows` packed query rows: those of one key head, token after token, the heads of its
    group side by side. Every compute warp holds all of them and owns `block_n / num_compute_warps`
    keys of each block, so each byte of K and V is read from shared memory once. `ctas_per_sm` is
    what registers and shared memory are cut for on a card with room, `smem_limit` what a CTA may
    take there. `rate` and `max_load` are what the plan knows of its speed: see splits.Pace.
    """

    head_dim: int
    rows: int
    block_n: int
    kv_stages: int
    ctas_per_sm: int
    num_compute_warps: int = 4
    kv_bytes: int = 2  # of one value of K or V; 1 is e4m3
    stack_bytes: int = 0
    smem_limit: int = SMEM_LIMIT_SM120
    rate: float = 1.8
    max_load: float = math.inf

    @property
    def pace(self) -> Pace:
        return Pace(self.rate, self.ctas_per_sm, self.max_load)

    @property
    def keys_per_warp(self) -> int:
        return self.block_n // self.num_compute_warps

    @property
    def num_threads(self) -> int:
        return (self.num_compute_warps + 1) * WARP_SIZE

    @property
    def load_warp(self) -> int:
        return self.num_compute_warps

    @property
    def swizzle_elements(self) -> int:
        """Columns of one swizzle atom of 16-bit elements: the widest of 64, 32, 16 that fits."""
        return next(n for n in (64, 32, 16) if self.kv_columns % n == 0)

    @property
    def kv_columns(self) -> int:
        """16-bit elements of a row of K or V: two values of e4m3 are one."""
        return self.head_dim * self.kv_bytes // 2

    @property
    def ring_bytes(self) -> int:
        return 2 * self.kv_columns * self.block_n * self.kv_stages

    @property
    def staging_bytes(self) -> int:
        """O of every warp in float32; it lies where the ring was."""
        return 4 * self.num_compute_warps * self.rows * (self.head_dim + STAGING_PAD)

    @property
    def smem_bytes(self) -> int:
        """Shared memory of one CTA: the ring, the warps' row statistics, the barriers."""
        stats = STATS_BYTES_A_ROW * self.num_compute_warps * self.rows
        return self.ring_bytes + stats + BARRIER_BYTES

    def check(self) -> None:
        """Assert what the kernel takes for granted; a row that fails is our bug."""
        assert self.rows % M_ATOM == 0 and self.head_dim % 16 == 0
        assert self.keys_per_warp % 16 == 0, "P is an operand of 16 keys"
        assert self.kv_stages >= 2, "K and V of one block are in flight together"
        assert self.staging_bytes <= self.ring_bytes, f"{self} has no room to merge the warps"
        assert self.smem_bytes <= self.smem_limit, f"{self} needs {self.smem_bytes} bytes"


def _row(
    head_dim: int, rows: int, block_n: int, kv_stages: int, ctas_per_sm: int, rate: float
) -> DecodeConfig:
    return DecodeConfig(
        head_dim=head_dim,
        rows=rows,
        block_n=block_n,
        kv_stages=kv_stages,
        ctas_per_sm=ctas_per_sm,
        rate=rate,
    )


# By head dimension, which serves smaller ones too: the configurations, fewest rows first. As many
# bytes in flight as 99 KB allow; 32 rows while O fits the registers. With 32 rows at d 128, ptxas
# spills 8 bytes for sm_120a and sm_121a, and 88 for sm_100a and sm_103a in the kernel with every
# step; with 32 rows at d 64, blocks of 128 would spill 48. Timed on an H200 (2026-11-29,
# docs/design.md): all of 16 rows.
#    head_dim, rows, block_n, kv_stages, ctas_per_sm, rate
DECODE_ROWS: dict[int, tuple[DecodeConfig, ...]] = {
    64: (_row(64, 16, 128, 6, 2, 2.05), _row(64, 32, 64, 12, 2, 1.8)),
    96: (_row(96, 16, 128, 4, 2, 1.85), _row(96, 32, 64, 8, 1, 1.8)),
    128: (
        _row(128, 16, 64, 6, 2, 1.8),
        replace(_row(128, 32, 64, 6, 1, 1.8), stack_bytes=88),
    ),
    192: (_row(192, 16, 64, 4, 1, 1.8),),
    256: (_row(256, 16, 64, 3, 1, 1.8),),
}

# e4m3: slots of half the bytes. Widening bounds a CTA, so blocks are longer where registers allow.
# With 32 rows of 128 columns, blocks of 64 spill up to 24 bytes already, and 184 for sm_100a and
# sm_103a in the kernel with every step. Timed: d 64 and 128 with 16 rows.
FP8_ROWS: dict[int, tuple[DecodeConfig, ...]] = {
    64: (_row(64, 16, 128, 12, 2, 0.65), _row(64, 32, 64, 24, 2, 0.65)),
    128: (
        _row(128, 16, 128, 6, 2, 1.05),
        replace(_row(128, 32, 64, 12, 1, 0.45), stack_bytes=184),
    ),
    192: (_row(192, 16, 64, 8, 1, 1.05),),
    256: (_row(256, 16, 64, 6, 1, 1.05),),
}

# What an H200 wants otherwise, for it has more than twice the shared memory. Measured there
# 2026-11-29, microseconds at kv 8192, bf16: d 128 in a ring of 128 KB, where there is at most one
# CTA for two SMs: b8 62.4 instead of 66.6, b4 35.6 instead of 36.6. d 192 (h_k 4), six slots, not
# four: b8 51.9 instead of 56.3. d 256 (h_k 4), four, not three: b8 68.4 instead of 75.8.
ROWS_OF_VARIANT: dict[str, dict[int, tuple[DecodeConfig, ...]]] = {
    "sm90a": {
        128: (
            replace(_row(128, 16, 64, 8, 1, 2.07), smem_limit=SMEM_LIMIT_SM90, max_load=0.5),
            *DECODE_ROWS[128],
        ),
        192: (replace(_row(192, 16, 64, 6, 1, 2.5), smem_limit=SMEM_LIMIT_SM90),),
        256: (replace(_row(256, 16, 64, 4, 1, 2.9), smem_limit=SMEM_LIMIT_SM90),),
    }
}


def decode_rows(kv_bytes: int, variant: str | None) -> dict[int, tuple[DecodeConfig, ...]]:
    """The table of a variant (None: of any card) for K and V values of so many bytes."""
    if kv_bytes == 1:
        return {
            head_dim: tuple(replace(cfg, kv_bytes=1) for cfg in configs)
            for head_dim, configs in FP8_ROWS.items()
        }
    return DECODE_ROWS | ROWS_OF_VARIANT.get(variant or "", {})
