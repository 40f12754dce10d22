"""Every precompiled attention kernel on the card that it is for; see CONTRIBUTING.md, Build.

With FLASH_ATTN_4_PACKAGE and FLASH_ATTN_4_JIT=0 these are the package's own kernels and nothing is
compiled; without, the same kernels compiled from the sources.
"""

import os

import pytest
import torch

from . import harness
from .conftest import GIVEN
from .shipped_cases import cases, questions

CASES = cases("sm90a")  # kinds of calls, the same for each card


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("key", "case"), CASES.items(), ids=[case.name.replace(" ", "-") for case in CASES.values()]
)
def test_right(fa4, key, case, device):
    for question in questions(key, case):
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
