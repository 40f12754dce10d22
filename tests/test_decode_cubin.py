"""What the compiler made of each decode row and of the combine kernel: as test_cubin."""

import re
import subprocess
import sys

import pytest

from . import cross_compile
from .conftest import ROOT
from .cuda_tools import find_tool
from .ptx_lint import suspects
from .sass_lint import disassemble, hasty_arrivals
from .test_cubin import MAX_REGISTERS, REGISTER_FILE, SMEM_LIMIT, SMEM_RESERVED


@pytest.fixture(scope="module", params=cross_compile.VARIANTS)
def compiled(request, tmp_path_factory):
    """name -> (key, PTX, machine code, [resources of each kernel in the cubin])."""
    pytest.importorskip("cutlass", reason="needs nvidia-cutlass-dsl")
    directory = tmp_path_factory.mktemp(request.param)
    command = [sys.executable, "-m", "tests.cross_compile", request.param, directory, "decode"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = {}
    for name, key in cross_compile.decode_keys(request.param).items():
        dump = [find_tool("cuobjdump"), "--dump-resource-usage", str(directory / f"{name}.cubin")]
        text = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
        used = [
            {field: int(n) for field, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
            for line in text.splitlines()
            if "REG:" in line
        ]
        assert len(used) == 1 + key.is_split, text
        code = disassemble(directory / f"{name}.cubin")
        found[name] = (key, (directory / f"{name}.ptx").read_text(), code, used)
    return found


def test_registers_leave_room_for_what_the_row_states(compiled):
    """`ctas_per_sm` CTAs fit the register file, and nothing is spilled beyond the row's word."""
    for name, (key, _, _, kernels) in compiled.items():
        for used in kernels:
            assert used["REG"] <= MAX_REGISTERS, name
            assert used["STACK"] + used["LOCAL"] <= key.cfg.stack_bytes, name
            threads = key.cfg.num_threads * key.cfg.ctas_per_sm
            assert used["REG"] * threads <= REGISTER_FILE, name


def test_shared_memory_fits_the_card(compiled):
    """FA#2594: the budget at every head dimension."""
    for name, (key, _, _, kernels) in compiled.items():
        limit = SMEM_LIMIT.get(key.variant) or SMEM_LIMIT["sm120"]
        for used in kernels:
            static = max(0, used["SHARED"] - SMEM_RESERVED)
            assert static + key.cfg.smem_bytes <= limit, name
        if key.cfg.ctas_per_sm > 1:  # two CTAs share what an SM of sm_90 has
            assert key.cfg.smem_bytes <= SMEM_LIMIT["sm120"], name


def test_every_kernel_carries_its_rings(compiled):
    """The frozen-ring lint, and that there are waits in the PTX for it to look at."""
    for name, (_, ptx, _, _) in compiled.items():
        assert "mbarrier.try_wait.parity" in ptx, name
        assert [str(s) for s in suspects(ptx)] == [], name


def test_no_arrival_overtakes_a_load(compiled):
    """A slot is given back when it has been read, in machine code too."""
    for name, (_, _, code, _) in compiled.items():
        assert "LDSM" in code, name
        assert hasty_arrivals(code) == [], name
