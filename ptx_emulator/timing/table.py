"""The machines: every constant of the model, with where it comes from.

`fitted` names the constants that calibrate.py may change: one value for all kernels and shapes of a
machine family, found on half of the published points. Nothing is tuned for a single point.
Cycles are the SM's. Widths are of one scheduler, a quarter of an SM, unless a name says otherwise.
"""

from dataclasses import dataclass, replace

FITTED = "fitted"

# name -> (Hopper sm_90, Blackwell sm_100, source). sm_103 differs by OVERRIDES.
CONSTANTS: dict[str, tuple[float, float, str]] = {
    # ---- pipes: cycles that a warp instruction holds its pipe for ----
    "fma": (1, 1, "CUDA programming guide: 128 fp32 results a clock and SM"),
    "fma2": (2, 2, "f32x2: two results a lane at the rate of 128 a clock (peak fp32 of a B200)"),
    "imad": (2, 2, "CUDA programming guide: 64 32-bit integer products a clock and SM"),
    "alu": (2, 2, "CUDA programming guide: 64 integer, logic, compare, minimum a clock and SM"),
    "convert": (2, 2, "CUDA programming guide: 64 conversions from 32 bits a clock and SM"),
    "mufu": (8, 8, "CUDA programming guide: 16 special functions a clock and SM"),
    "mma_sync": (6, 6, "measured: 640 TFLOP/s on an H200 at 1.755 GHz, 4096 FLOP an instruction"),
    "lsu": (2, 2, "assumed: one memory instruction in two cycles and scheduler"),
    # ---- tensor cores and memories ----
    "tensor_flops": (3072, 8192, "data sheet: dense bf16; sm_90: fitted, 4096 by data sheet"),
    "smem_bytes": (128, 128, "CUDA programming guide: 32 banks of 4 bytes an SM"),
    "tmem_read_bytes": (128, 128, "assumed: 32 lanes of 4 bytes a clock and scheduler"),
    "tmem_write_bytes": (128, 128, "assumed: as for reads"),
    "l2_bytes": (64, 64, "measured by others: an SM's share of L2 reads, bytes a clock"),
    "mufu_queue": (4, 4, "assumed: special functions that may wait in front of their pipe"),
    # ---- latencies, from issue to a use of the result ----
    "alu_latency": (4, 4, "Luo et al. 2025, arXiv 2501.12084: dependent ALU and FMA issue"),
    "mufu_latency": (18, 18, "measured by others on Volta to Hopper: MUFU 17 to 23 cycles"),
    "mma_sync_latency": (33, 33, "Luo et al. 2025: m16n8k16 with fp32 accumulators"),
    "smem_latency": (29, 29, "Luo et al. 2025: shared memory load"),
    "shuffle_latency": (23, 23, "measured by others on Volta to Hopper"),
    "global_latency": (600, 700, "Luo et al. 2025: L2 hit to HBM, 270 to 600 and above"),
    "tma_latency": (400, 400, FITTED),
    "store_latency": (200, 200, "assumed: until a bulk store has read shared memory"),
    "wgmma_latency": (40, 0, "Luo et al. 2025: m64n8k16 18, larger N its issue time more"),
    "mma_latency": (0, 120, FITTED),
    "tmem_latency": (0, 15, FITTED),
    "sync_latency": (10, 10, FITTED),
    "arrive_latency": (10, 10, "assumed: from an arrival's issue to the barrier"),
    "commit_latency": (20, 20, "assumed: from a product's end to the barrier"),
    # ---- the launch ----
    "issue_stretch": (1, 1, "PTX and SASS agree to a few percent in the loops: docs/timing.md"),
    "cta_cycles": (0, 0, FITTED),
    "launch_us": (3.0, 3.0, "assumed: a launch, as events around it see it"),
    "hbm_bytes_us": (4.27e6, 7.0e6, "H200: copies measured; B200: data sheet, less 12 %"),
    "clock_ghz": (1.755, 1.755, "H200: of the mma.sync ceiling; B200: locked, see published.py"),
    "sms": (132, 148, "data sheets"),
}  # fmt: skip

# What sm_103 has other than sm_100.
OVERRIDES: dict[str, tuple[float, str]] = {
    "mufu": (4, "NVIDIA: Blackwell Ultra doubles the special functions for attention"),
    "clock_ghz": (1.92, "assumed: between what is sustained and the boost clock"),
}

FAMILIES = {"sm_90a": 0, "sm_100a": 1, "sm_103a": 1}
FITTED_NAMES = tuple(name for name, row in CONSTANTS.items() if row[2] == FITTED)


@dataclass(frozen=True)
class Machine:
    """One card: values by name."""

    arch: str
    values: dict[str, float]

    def __getitem__(self, name: str) -> float:
        return self.values[name]

    def with_values(self, **values: float) -> "Machine":
        """The same card with some constants changed."""
        unknown = set(values) - set(self.values)
        if unknown:
            raise ValueError(f"no such constants: {sorted(unknown)}: see CONSTANTS in table.py")
        return replace(self, values={**self.values, **values})


def machine_of(arch: str) -> Machine:
    """The machine of sm_90a, sm_100a or sm_103a.

    Raises:
        ValueError: another arch.
    """
    if arch not in FAMILIES:
        raise ValueError(f"arch={arch!r} has no timing model: use one of {', '.join(FAMILIES)}")
    values = {name: float(row[FAMILIES[arch]]) for name, row in CONSTANTS.items()}
    if arch == "sm_103a":
        values |= {name: float(value) for name, (value, _) in OVERRIDES.items()}
    return Machine(arch, values)
