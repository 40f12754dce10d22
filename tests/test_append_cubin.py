"""What ptxas made of the append kernel for every card, and how wide its copies are."""

import re
import subprocess
import sys

import pytest

from . import cross_compile
from .conftest import ROOT
from .test_cubin import resources

THREADS, REGISTER_FILE, CTAS = 256, 65_536, 4


@pytest.mark.parametrize("variant", cross_compile.VARIANTS)
def test_append_kernels(variant, tmp_path):
    """No array in local memory, four CTAs an SM, and 16 bytes a copy where rows are aligned."""
    pytest.importorskip("cutlass", reason="needs nvidia-cutlass-dsl")
    command = [sys.executable, "-m", "tests.cross_compile", variant, str(tmp_path), "append"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    for name, key in cross_compile.append_keys(variant).items():
        used = resources(tmp_path / f"{name}.cubin")
        assert used["STACK"] == used["LOCAL"] == 0, name
        assert used["REG"] * THREADS * CTAS <= REGISTER_FILE, (name, used)
        ptx = (tmp_path / f"{name}.ptx").read_text()
        loads, stores = ("ld.global.v4.b32", "st.global.v4.b32")
        assert bool(re.search(loads, ptx)) == (key.vector == 8), name
        if not key.fp8:
            assert bool(re.search(stores, ptx)) == (key.vector == 8), name
