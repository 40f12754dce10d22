"""Our tcgen05 kernel beside upstream's, counted in the emulator: no card of the family is needed.

usage: python -m benchmarks.compare_counters [--arch sm100a] [--seqlen 2048] [--only d128_causal]

For each problem and role: warp instructions by pipe, bytes of shared and tensor memory and waits,
all per 128 x 128 tile of scores that is not masked as a whole; registers and stack from the cubin.
Then the cycles that each unit of an SM needs for a tile, of which the largest bounds it: 8192 FLOP
of MMA, 16 exponentials (sm_103: 32), 4 instructions and 128 bytes of shared memory a cycle.
Instructions are the PTX's. Its moves and branches ("other") are left out of the cycles: most of
them only pair registers, and ptxas drops them.
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

import ptx_emulator
from ptx_emulator.cli import ours, third_party
from ptx_emulator.cli.case import Case, judge, make_inputs
from ptx_emulator.counters import PIPES, Role

from .common import table, write_json

# name -> (d, d_v, causal)
PROBLEMS = {
    f"d{d}{'' if d == d_v else f'_{d_v}'}_{mask}": (d, d_v, mask == "causal")
    for d, d_v in ((64, 64), (128, 128), (192, 128))
    for mask in ("dense", "causal")
}
BLOCK = 128
KERNELS: dict[str, Callable] = {"ours": ours.forward, "upstream": third_party.forward}
WARP = 32
SCHEDULERS = 4  # of an SM: each issues one instruction a cycle for a quarter of the warps
MMA_FLOPS, SMEM_BYTES = 8192, 128  # a cycle
EXPONENTIALS = {"sm100a": 16, "sm103a": 32}  # a cycle


@dataclass(frozen=True)
class Count:
    """What one kernel did for one problem, per tile, and what its cubin says."""

    roles: dict[str, dict[str, float]]
    registers: int
    stack: int


def problem(name: str, seqlen: int) -> Case:
    """One sequence and head, bf16."""
    d, d_v, causal = PROBLEMS[name]
    return Case(
        dtype=torch.bfloat16, batch=1, heads=1, kv_heads=1, seqlen_q=seqlen, seqlen_k=seqlen,
        head_dim=d, head_dim_v=d_v, right=0 if causal else None,
    )  # fmt: skip


def num_tiles(case: Case) -> int:
    """Tiles of 128 x 128 scores that are not masked as a whole."""
    rows = -(-case.seqlen_q // BLOCK)
    return rows * (rows + 1) // 2 if case.right == 0 else rows * rows


def count(kernel: str, arch: str, case: Case) -> Count:
    """Run a kernel and count. Raises AssertionError if its result is wrong."""
    cubins: list[bytes] = []
    with ptx_emulator.session(arch, races=False) as emulator:
        plain = emulator.host.remember
        emulator.host.remember = lambda ptx, cubin: (cubins.append(cubin), plain(ptx, cubin))
        try:
            inputs = make_inputs(case)
            verdict = judge(case, inputs, *KERNELS[kernel](emulator, case, inputs))
        finally:
            emulator.host.remember = plain
        assert verdict.ok, f"{kernel} is wrong: {verdict}"
        (run,) = emulator.runs
    used = resources(cubins[-1])
    tiles = num_tiles(case)
    roles = {role.name: per_tile(role, tiles) for role in run.roles}
    return Count(roles, used["REG"], used["STACK"] + used["LOCAL"])


def per_tile(role: Role, tiles: int) -> dict[str, float]:
    slots = sum(n for pipe, n in role.slots.items() if pipe != "other")
    numbers: dict[str, float] = {"slots": slots, **role.slots}
    numbers |= {f"{name} bytes": role.bytes[name] for name in ("shared", "tmem")}
    numbers["waits"] = role.waits
    # Each warp belongs to one of the schedulers: the busiest counts.
    numbers["busiest"] = slots / len(role.warps) * -(-len(role.warps) // SCHEDULERS)
    return {name: round(number / tiles, 2) for name, number in numbers.items()}


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL of the one kernel in a cubin, by cuobjdump."""
    files = metadata.files("nvidia-cuda-cuobjdump") or []
    tool = next((str(f.locate()) for f in files if f.name == "cuobjdump"), "cuobjdump")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [tool, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def cycles(found: Count, arch: str, case: Case) -> dict[str, float]:
    """Cycles of an SM for one tile, by unit; the largest bounds the tile."""
    tensor = 2 * BLOCK * BLOCK * (case.head_dim + case.head_dim_v) / MMA_FLOPS
    mufu = sum(role["mufu"] for role in found.roles.values()) * WARP / EXPONENTIALS[arch]
    issue = sum(role["busiest"] for role in found.roles.values())
    memory = sum(role["shared bytes"] for role in found.roles.values()) / SMEM_BYTES
    units = {"tensor": tensor, "exp2": mufu, "issue": issue, "shared": memory}
    return {"bound": max(units.values())} | units


def rows(name: str, both: dict[str, Count], arch: str, case: Case) -> list[list[str]]:
    """Lines of the table: problem, what is counted, ours, upstream's, their quotient."""

    def line(what: str, values: list[float]) -> list[str]:
        mine, theirs = values
        quotient = f"{mine / theirs:.2f}" if theirs else "-"
        return [name, what, f"{mine:.1f}", f"{theirs:.1f}", quotient]

    found = list(both.values())
    units = [cycles(one, arch, case) for one in found]
    lines = [line(f"cycles: {unit}", [u[unit] for u in units]) for unit in units[0]]
    kinds = sorted({kind for one in found for kind in one.roles})
    for kind in kinds:
        for what in ("slots", *PIPES, "shared bytes", "tmem bytes", "waits"):
            values = [one.roles.get(kind, {}).get(what, 0.0) for one in found]
            if any(values):
                lines.append(line(f"{kind}: {what}", values))
    lines.append(line("registers at launch", [one.registers for one in found]))
    lines.append(line("stack bytes", [one.stack for one in found]))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="sm100a", choices=EXPONENTIALS)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--only", nargs="*", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--output", type=Path, help="also write the numbers here, as JSON")
    options = parser.parse_args()
    lines, found = [], []
    for name in options.only:
        case = problem(name, options.seqlen)
        both = {kernel: count(kernel, options.arch, case) for kernel in KERNELS}
        lines += rows(name, both, options.arch, case)
        found.append({"problem": name, **{kernel: vars(one) for kernel, one in both.items()}})
    print(table(["problem", "per tile", "ours", "upstream", "ours / upstream"], lines))
    if options.output:
        write_json(options.output, found, arch=options.arch, seqlen=options.seqlen)


if __name__ == "__main__":
    main()
