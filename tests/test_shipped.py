"""Every precompiled attention kernel on the card that it is for; see CONTRIBUTING.md, Build.

With FLASH_ATTN_4_PACKAGE and FLASH_ATTN_4_JIT=0 these are the package's own kernels and nothing is
compiled; without, the same kernels compiled from the sources.
"""

import os
from dataclasses import replace

import pytest
import torch

from . import harness
from .conftest import GIVEN
from .shipped_cases import cases

CASES = list(cases("sm90a").values())  # kinds of calls, the same for each card


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_right(fa4, case, device):
    """As small as in the emulator, and as long as people ask."""
    longer = tuple(8 * n for n in case.seqlens_k)
    used = None if case.used_k is None else tuple(8 * n for n in case.used_k)
    for question in (case, replace(case, seqlens_k=longer, used_k=used)):
        harness.verify(fa4, question, device)


@pytest.mark.gpu
@pytest.mark.skipif(not GIVEN, reason="needs a package with precompiled kernels")
def test_without_a_compiler(fa4):
    """What was said of this package: nothing that was run has been compiled."""
    import sys

    assert os.environ.get("FLASH_ATTN_4_JIT") == "0", "set FLASH_ATTN_4_JIT=0"
    assert "cutlass" not in sys.modules
    q = torch.randn(1, 300, 8, 128, device="cuda", dtype=torch.bfloat16)
    assert "precompiled" in fa4.explain(q, q, q, causal=True)
    assert "kernels are precompiled" in fa4.describe()
