"""The SGLang plugin in SGLang's own files: hook registry, dispatcher and FlashAttention-4 wrapper.

The package itself does not import without a GPU's libraries, so it is entered below its __init__,
and FlashAttention-3, which the dispatcher imports besides, is a stand-in.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("flash_attn_4_sglang", reason="needs the environment of make test-vllm")
if find_spec("sglang") is None:
    pytest.skip("needs SGLang's files", allow_module_level=True)

HEADS, KV_HEADS, D, PAGE = 4, 2, 32, 16
OPS = "sglang.kernels.ops.attention"


@pytest.fixture(scope="module")
def sglang():
    """SGLang's modules by name, with the plugin loaded as SGLang loads it."""
    package = ModuleType("sglang")
    package.__path__ = [str(Path(find_spec("sglang").origin).parent)]
    older = ModuleType(f"{OPS}.flash_attention_v3")
    older.flash_attn_varlen_func = older.flash_attn_with_kvcache = None
    kept = dict(sys.modules)
    sys.modules |= {"sglang": package, older.__name__: older}
    plugins = importlib.import_module("sglang.srt.plugins")
    dispatcher = importlib.import_module(f"{OPS}.flash_attention")
    wrapper = importlib.import_module(f"{OPS}.flash_attention_v4")
    original = inspect.unwrap(wrapper.flash_attn_varlen_func)
    plugins.load_plugins()
    yield {"dispatcher": dispatcher, "wrapper": wrapper, "original": original}
    plugins.HookRegistry.reset()
    for name in set(sys.modules) - set(kept):
        if name.startswith("sglang"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def kernel(build):
    from flash_attn_4_sglang import kernel

    return kernel()


def decoding():
    """q and pages of three requests, as the backend fa4 passes them."""
    cache = torch.randn(9, PAGE, 2 * KV_HEADS, D)
    k, v = cache[:, :, :KV_HEADS], cache[:, :, KV_HEADS:]
    q = torch.randn(6, HEADS, D)
    named = {
        "page_table": torch.randperm(9).reshape(3, 3).int(),
        "cache_seqlens": torch.tensor([33, 5, 48], dtype=torch.int32),
        "cu_seqlens_q": torch.tensor([0, 1, 2, 6], dtype=torch.int32),
        "max_seqlen_q": 4,
        "softmax_scale": 0.2,
        "causal": True,
    }
    return (q, k, v), named


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"window_size": (7, 0), "softcap": 2.0, "num_splits": 2},
        {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0]), "return_softmax_lse": True},
        {"k_descale": torch.ones(3, KV_HEADS), "v_descale": torch.ones(3, KV_HEADS)},
    ],
    ids=["plain", "window", "sinks", "descales_of_no_fp8"],
)
def test_decoding_reaches_the_kernel(sglang, kernel, extra):
    tensors, named = decoding()
    ours = sglang["dispatcher"].flash_attn_with_kvcache(
        *tensors, **named, **extra, cu_seqlens_k_new=named["cu_seqlens_q"], ver=4
    )
    known = {k: v for k, v in extra.items() if not k.endswith("descale")}
    known = {{"sinks": "s_aux"}.get(k, k): v for k, v in known.items()}
    expected = kernel.flash_attn_with_kvcache(*tensors, **named, **known)
    pairs = zip(ours, expected, strict=True) if isinstance(expected, tuple) else [(ours, expected)]
    assert isinstance(ours, tuple) == isinstance(expected, tuple)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs)


def test_fp8_pages(sglang, kernel):
    (q, k, v), named = decoding()
    k, v = (x.to(torch.float8_e4m3fn) for x in (k, v))
    scales = {"k_descale": torch.full((3, 2), 0.5), "v_descale": torch.full((3, 2), 2.0)}
    ours = sglang["dispatcher"].flash_attn_with_kvcache(q, k, v, **named, **scales, ver=4)
    expected = kernel.flash_attn_with_kvcache(q, k, v, **named, **scales)
    torch.testing.assert_close(ours, expected)


def test_prefill_reaches_the_kernel(sglang, kernel):
    q, k, v = (torch.randn(20, heads, D) for heads in (HEADS, KV_HEADS, KV_HEADS))
    starts = torch.tensor([0, 13, 20], dtype=torch.int32)
    out = torch.empty_like(q)
    ours, lse = sglang["dispatcher"].flash_attn_varlen_func(
        q, k, v, starts, starts, 13, 13, causal=True, return_softmax_lse=True, out=out, ver=4
    )
    expected = kernel.flash_attn_varlen_func(
        q, k, v, starts, starts, 13, 13, causal=True, return_lse=True
    )
    assert ours.data_ptr() == out.data_ptr()
    torch.testing.assert_close((ours, lse), expected)


def test_the_rest_is_left_to_sglang(sglang, monkeypatch, caplog):
    import flash_attn_4_sglang

    seen = []
    q = torch.randn(3, HEADS, D)

    def original(*args, **named):
        seen.append(named)
        return args[0]

    for named in ({"qv": q}, {"sfk": q}, {"rel_bias": q}):
        assert flash_attn_4_sglang.attend(original, q, q, q, causal=True, **named) is q
        assert seen.pop() == {"causal": True, **named}
    # SGLang 0.5.23 stores a cache divided by its factors, and prefills by fa4 without them.
    pages, factor = q.to(torch.float8_e4m3fn), torch.ones(1, HEADS)
    for named in ({}, {"k_descale": factor}, {"v_descale": factor}):
        assert flash_attn_4_sglang.attend(original, q, pages, pages, **named) is q
        assert seen.pop() == named
    assert flash_attn_4_sglang.attend(original, q, q, q, None, None, q, causal=True) is q
    wide = torch.randn(3, HEADS, 512)
    assert flash_attn_4_sglang.attend(original, wide, wide, wide) is wide
    for reason in ("head_dim 512", "qv", "without k_descale", "3 positional"):
        assert reason in caplog.text


def test_every_argument_of_sglangs_is_known(sglang, kernel):
    """A release that adds an argument to its function must not have it passed on unseen."""
    import flash_attn_4_sglang as plugin

    theirs = set(inspect.signature(sglang["original"]).parameters) - {"_"}
    ours = set(inspect.signature(kernel.flash_attn_varlen_func).parameters)
    assert theirs - ours == {*plugin.RENAMED, *plugin.LEFT_TO_SGLANG, *plugin.MEANINGLESS} - ours


def test_entry_point():
    (found,) = entry_points(group="sglang.srt.plugins", name="flash_attn_4")
    assert found.value == "flash_attn_4_sglang:register"
