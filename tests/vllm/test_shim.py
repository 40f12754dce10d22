"""vLLM's own FlashAttention interface, unchanged, with the kernel in the place of its FA4."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import vllm
from flash_attn_4_vllm.shim import flash_attn_fwd

from .test_layer import HEADS, D, step

PACKAGE = "vllm.vllm_flash_attn"


@pytest.fixture
def interface(monkeypatch):
    """vllm/vllm_flash_attn/flash_attn_interface.py, without the CUDA extensions around it."""
    modules = {name: ModuleType(name) for name in (PACKAGE, f"{PACKAGE}.cute")}
    modules[PACKAGE].__path__ = []
    replaced = ModuleType(f"{PACKAGE}.cute.interface")
    replaced._flash_attn_fwd = flash_attn_fwd
    for name, module in {**modules, replaced.__name__: replaced}.items():
        monkeypatch.setitem(sys.modules, name, module)
    path = Path(vllm.__file__).parent / "vllm_flash_attn" / "flash_attn_interface.py"
    spec = importlib.util.spec_from_file_location(f"{PACKAGE}.flash_attn_interface", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_vllm_unpacks_what_it_gets(kernel, interface):
    common = step(((1, 33), (4, 50))).common
    pages = torch.randn(24, 16, 2, 2 * D)
    k, v = pages.split(D, dim=-1)
    q = torch.randn(5, HEADS, D)
    out, lse = interface.flash_attn_varlen_func(
        q,
        k,
        v,
        max_seqlen_q=4,
        cu_seqlens_q=common.query_start_loc,
        max_seqlen_k=50,
        seqused_k=common.seq_lens,
        block_table=common.block_table_tensor,
        causal=True,
        window_size=[7, 0],
        return_softmax_lse=True,
        fa_version=4,
    )
    expected = kernel.flash_attn_varlen_func(
        q,
        k,
        v,
        common.query_start_loc,
        seqused_k=common.seq_lens,
        block_table=common.block_table_tensor,
        causal=True,
        window_size=(7, 0),
        return_lse=True,
    )
    assert out.equal(expected[0])
    assert lse.equal(expected[1])
