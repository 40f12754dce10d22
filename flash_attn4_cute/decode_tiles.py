"""Tile configurations of the decode kernel, as data."""

from dataclasses import dataclass, replace

from .tiles import BARRIER_BYTES, SMEM_LIMIT_SM120, WARP_SIZE

M_ATOM = 16  # rows of one mma.sync.m16n8k16
STATS_BYTES_A_ROW = 8  # a warp's maximum and sum of one row, float32
STAGING_PAD = 8  # floats between rows of staged O, so that pairs of columns meet no bank twice


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig:
    """One configuration of the mma.sync decode kernel.

    A CTA holds `rows` packed query rows: those of one key head, token after token, the heads of its
    group side by side. Every compute warp holds all of them and owns `block_n / num_compute_warps`
    keys of each block, so each byte of K and V is read from shared memory once. `ctas_per_sm` is
    what registers and shared memory are cut for on a card with room.
    """

    head_dim: int
    rows: int
    block_n: int
    kv_stages: int
    ctas_per_sm: int
    num_compute_warps: int = 4
    kv_bytes: int = 2  # of one value of K or V; 1 is e4m3
    stack_bytes: int = 0

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
        assert self.smem_bytes <= SMEM_LIMIT_SM120, f"{self} needs {self.smem_bytes} bytes"


def _row(
    head_dim: int, rows: int, kv_stages: int, ctas_per_sm: int, spills: int = 0
) -> DecodeConfig:
    return DecodeConfig(
        head_dim=head_dim,
        rows=rows,
        block_n=64,
        kv_stages=kv_stages,
        ctas_per_sm=ctas_per_sm,
        stack_bytes=spills,
    )


def decode_rows(kv_bytes: int) -> dict[int, tuple[DecodeConfig, ...]]:
    """The table for values of so many bytes: e4m3 has slots of half the bytes, twice as many.

    Widening takes registers: with 32 rows of 128 columns, ptxas spills up to 24 bytes, and 184 for
    sm_100a and sm_103a in the kernel with every step.
    """
    if kv_bytes == 2:
        return DECODE_ROWS
    spilled = {(128, 32): 184}
    return {
        head_dim: tuple(
            replace(
                cfg,
                kv_bytes=1,
                kv_stages=2 * cfg.kv_stages,
                stack_bytes=spilled.get((cfg.head_dim, cfg.rows), 0),
            )
            for cfg in configs
        )
        for head_dim, configs in DECODE_ROWS.items()
        if head_dim % 64 == 0
    }


# By head dimension, which serves smaller ones too: the configurations, fewest rows first. As many
# bytes in flight as 99 KB allow; 32 rows while O fits the registers. With 32 rows at d 128, ptxas
# spills 8 bytes for sm_120a and sm_121a, and 88 for sm_100a and sm_103a in the kernel with every
# step. Only d 128 has been timed, on an H200: see docs/design.md.
DECODE_ROWS: dict[int, tuple[DecodeConfig, ...]] = {
    64: (_row(64, 16, 12, 2), _row(64, 32, 12, 2)),
    96: (_row(96, 16, 8, 2), _row(96, 32, 8, 1)),
    128: (_row(128, 16, 6, 2), _row(128, 32, 6, 1, spills=88)),
    192: (_row(192, 16, 4, 1),),
    256: (_row(256, 16, 3, 1),),
}
