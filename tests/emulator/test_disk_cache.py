"""A kernel read from the cache of an earlier process computes what it computed there."""

import pytest
import torch

import ptx_emulator
from flash_attn4_cute import compiler, disk_cache
from ptx_emulator.cli import ours
from ptx_emulator.cli.case import Case, judge, make_inputs


@pytest.mark.parametrize("seqlen_q", [1, 130], ids=["decode", "prefill"])
def test_read_back(seqlen_q, tmp_path, monkeypatch):
    question = Case(
        dtype=torch.bfloat16, batch=1, heads=2, kv_heads=1, seqlen_q=seqlen_q, seqlen_k=200,
        head_dim=64, head_dim_v=64, right=0,
    )  # fmt: skip
    inputs = make_inputs(question)
    compile_kernel, read_back = compiler.compile_kernel, []

    def through_the_disk(key):
        with monkeypatch.context() as patched:
            patched.setattr(disk_cache, "folder", lambda: tmp_path)
            disk_cache.store(key, compile_kernel(key))
            read_back.append(disk_cache.load(key))
        return read_back[-1]

    monkeypatch.setattr(compiler, "compile_kernel", through_the_disk)
    compiler.compiled.cache_clear()
    with ptx_emulator.session("sm_120a", schedule=1, strict=True) as emulator:
        verdict = judge(question, inputs, *ours.forward(emulator, question, inputs))
    compiler.compiled.cache_clear()
    assert read_back and None not in read_back
    assert verdict.ok, verdict
