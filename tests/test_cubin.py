"""What the compiler made of each plan row, read from the machine code, on any machine.

Every row is compiled for every variant. cuobjdump (package nvidia-cuda-cuobjdump) reads registers,
stack and static shared memory from the cubin; the PTX shows setmaxnreg. What is measured must be
within what the row states, and what the row states within what the card has.
"""

import fcntl
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from flash_attn4_cute import plan
from flash_attn4_cute.build import cubin
from flash_attn4_cute.device import FAMILIES

from . import cross_compile
from .conftest import ROOT
from .cuda_tools import find_tool
from .ptx_lint import suspects
from .sass_lint import disassemble, hasty_arrivals

# Bytes a CTA may opt in to (CUDA C++ guide, table 30); the family of sm_120 keeps to what it has.
SMEM_LIMIT = {"sm90a": 232_448, "sm120": 101_376, "sm100": 232_448}
SMEM_RESERVED = 1_024  # bytes the driver takes of each CTA's static share, on sm_90 and later
REGISTER_FILE = 65_536
MAX_REGISTERS = 255


@dataclass(frozen=True)
class Compiled:
    """One kernel: its key, PTX, machine code (mma.sync), and what cuobjdump says of its cubin.

    `spilled` is what the index of a package says of it: bytes of spill stores and loads.
    """

    key: object
    ptx: str
    code: str
    spilled: tuple[int, int]
    registers: int
    stack: int
    local: int
    shared: int


def resources(cubin: Path) -> dict[str, int]:
    """The most REG, STACK, SHARED and LOCAL of a kernel in a cubin; a merge may be in it too."""
    command = [find_tool("cuobjdump"), "--dump-resource-usage", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [line for line in text.splitlines() if "REG:" in line]
    assert 1 <= len(lines) <= 2, text
    found: dict[str, int] = {}
    for name, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", "\n".join(lines)):
        found[name] = max(found.get(name, 0), int(n))
    return found


def spilled(path: Path) -> tuple[int, int]:
    """Bytes of spill stores and loads of the kernels in a cubin, as the build counts them."""
    used = cubin.resources(path.read_bytes()).values()
    return sum(k.spill_stores for k in used), sum(k.spill_loads for k in used)


@pytest.fixture(scope="session", params=cross_compile.VARIANTS)
def compiled(request, tmp_path_factory) -> dict[str, Compiled]:
    """name -> Compiled for every key of one variant, compiled once a test run."""
    pytest.importorskip("cutlass", reason="needs nvidia-cutlass-dsl")
    variant, base = request.param, tmp_path_factory.getbasetemp()
    shared = base.parent if hasattr(request.config, "workerinput") else base
    directory = shared / f"cubin-{variant}"
    directory.mkdir(exist_ok=True)
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (directory / "keys.json").exists():
            command = [sys.executable, "-m", "tests.cross_compile", variant, str(directory)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-4000:]
    kernels = {}
    for name, key in cross_compile.keys(variant).items():
        used = resources(directory / f"{name}.cubin")
        kernels[name] = Compiled(
            key,
            (directory / f"{name}.ptx").read_text(),
            disassemble(directory / f"{name}.cubin") if key.family == "sm120" else "",
            spilled(directory / f"{name}.cubin"),
            *(used[field] for field in ("REG", "STACK", "LOCAL", "SHARED")),
        )
    return kernels


def test_every_row_compiles(compiled):
    """Each row yields a kernel, for the variant's own architecture."""
    for name, kernel in compiled.items():
        arch = kernel.key.variant.replace("sm", "sm_")
        assert re.search(rf"^\.target {arch}\b", kernel.ptx, re.M), name


def test_registers_fit_the_card(compiled):
    """At launch every thread has REG registers; after setmaxnreg each role its own number."""
    for name, kernel in compiled.items():
        cfg = kernel.key.cfg
        assert kernel.registers <= MAX_REGISTERS, name
        assert kernel.registers * cfg.num_threads <= REGISTER_FILE, name
        changes = re.findall(r"setmaxnreg\.(inc|dec)\S*\s+(\d+)", kernel.ptx)
        assert {(kind, int(n)) for kind, n in changes} == cfg.registers.changes, name


def test_nothing_is_spilled_beyond_what_the_row_states(compiled):
    """Stack and local memory are spilled registers or arrays indexed at run time."""
    found = {
        name: f"{kernel.stack} bytes of stack, {kernel.local} local"
        for name, kernel in compiled.items()
        if kernel.stack + kernel.local > kernel.key.cfg.stack_bytes
    }
    assert found == {}


def test_spills_are_those_of_the_listing(compiled):
    """What a package's index says of them is counted in the code; nvdisasm reads that too."""
    for name, kernel in compiled.items():
        assert kernel.stack or not any(kernel.spilled), name
        if kernel.key.family == "sm120":
            assert (moved("STL", kernel.code), moved("LDL", kernel.code)) == kernel.spilled, name


def moved(operation: str, listing: str) -> int:
    """Bytes that the instructions of this name move, 4 where they do not say how many."""
    found = re.findall(rf"\b{operation}((?:\.\w+)*) ", listing)
    return sum({"64": 8, "128": 16}.get(kind.rpartition(".")[2], 4) for kind in found)


def test_shared_memory_fits_the_card(compiled):
    """FA#2594: the budget at every head dimension. Dynamic by the row, static by the cubin."""
    for name, kernel in compiled.items():
        static = max(0, kernel.shared - SMEM_RESERVED)
        limit = SMEM_LIMIT.get(kernel.key.variant) or SMEM_LIMIT[kernel.key.family]
        assert static + kernel.key.cfg.smem_bytes <= limit, name


def test_every_kernel_carries_its_rings(compiled):
    """The frozen-ring lint, and that there are waits in the PTX for it to look at."""
    for name, kernel in compiled.items():
        assert "mbarrier.try_wait.parity" in kernel.ptx, name
        assert [str(s) for s in suspects(kernel.ptx)] == [], name


def test_no_arrival_overtakes_a_load(compiled):
    """A slot is given back when it has been read, in machine code too."""
    for name, kernel in compiled.items():
        if kernel.key.family == "sm120":
            assert "LDSM" in kernel.code, name
            assert hasty_arrivals(kernel.code) == [], name


def test_a_row_for_every_variant_and_head_dim():
    """No variant lacks a head dimension that another of its family has."""
    by_family = {}
    for variant in cross_compile.VARIANTS:
        dims = tuple((row.head_dim, row.head_dim_v) for row in plan.forward_rows(variant))
        by_family.setdefault(FAMILIES[variant], set()).add(dims)
        assert {(64, 64), (96, 96), (128, 128), (192, 128)} <= set(dims), variant
    assert all(len(dims) == 1 for dims in by_family.values()), by_family
