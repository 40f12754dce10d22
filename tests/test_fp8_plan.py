"""Which kernel reads e4m3 keys and values: those of mma.sync, on every card."""

import importlib

import pytest
import torch

from tests.test_errors import card, gpu_problem  # noqa: F401 (a fixture)

CARDS = {
    "sm90a": (9, 0),
    "sm100a": (10, 0),
    "sm103a": (10, 3),
    "sm120a": (12, 0),
    "sm121a": (12, 1),
}


def fp8(fa4, **changes):
    """A chunk of 128 queries in 4 heads to a key head, behind a cache of e4m3."""
    known = {"fp8_kv": True, "num_heads_kv": 1, "has_k_descale": True, "has_seqused_k": True}
    return gpu_problem(fa4, **{**known, **changes})


def paged(fa4, page_size, **changes):
    layout = fa4.flash_attn4_cute.problem.Layout.PAGED
    return fp8(fa4, kv_layout=layout, page_size=page_size, **changes)


@pytest.mark.parametrize("variant", CARDS)
def test_many_rows_and_few(fa4, card, variant):  # noqa: F811
    """More than 128 packed rows take the forward kernel, with tiles for e4m3."""
    make_plan = card(CARDS[variant]).make_plan
    key = make_plan(fp8(fa4, num_splits=3)).key
    assert type(key).__name__ == "ForwardKey" and key.has_fp8_kv and key.variant == variant
    assert (key.family, key.has_k_descale, key.has_v_descale) == ("sm120", True, False)
    assert "keys of e4m3" in make_plan(fp8(fa4)).explain()
    assert type(make_plan(fp8(fa4, seqlen_q=64)).key).__name__ == "DecodeKey"
    assert type(make_plan(fp8(fa4, seqlen_q=65)).key).__name__ == "ForwardKey"
    assert not make_plan(gpu_problem(fa4, seqlen_q=300)).key.has_fp8_kv


@pytest.mark.parametrize(
    ("dims", "page_size", "row", "box_n"),
    [
        ((64, 64), 16, (64, 64), 16),
        ((64, 64), 64, (64, 64), 32),
        ((48, 64), 5, (128, 128), 1),  # rows of 64 bytes begin at 128 only every second time
        ((96, 96), 2, (128, 128), 2),  # and rows of 32 every fourth
        ((96, 80), 16, (96, 96), 16),
        ((192, 128), 128, (192, 128), 64),
        ((192, 192), 1, (256, 256), 1),
    ],
)
def test_pages(fa4, card, dims, page_size, row, box_n):  # noqa: F811
    """The narrowest tile whose boxes TMA can place."""
    changes = {"head_dim": dims[0], "head_dim_v": dims[1]}
    cfg = card((10, 0)).make_plan(paged(fa4, page_size, **changes)).key.cfg
    assert ((cfg.head_dim, cfg.head_dim_v), cfg.box_n) == (row, box_n)


def test_dims(fa4, card):  # noqa: F811
    """A row of e4m3 must be a multiple of 16 bytes."""
    with pytest.raises(NotImplementedError, match=r"k.dtype, v.dtype=.*multiples of 16"):
        card((12, 0)).make_plan(fp8(fa4, head_dim=72))


def test_strides_of_size_1(fa4):
    """They mean nothing, and may be odd where two values are one to the kernels."""
    launch = importlib.import_module(f"{fa4.__name__}.flash_attn4_cute.launch")
    tensors = fa4.flash_attn4_cute.problem.AttentionTensors
    storage = torch.zeros(5 * 64 + 16, dtype=torch.uint8).view(torch.float8_e4m3fn)
    k = storage.as_strided((1, 5, 1, 64), (241, 64, 7, 1))
    found = launch.cache_views(fp8(fa4), tensors(q=k, k=k, v=k))
    for view in found:
        assert view.shape == (1, 5, 1, 32) and view.dtype is torch.bfloat16
        assert all(stride % 8 == 0 for stride in view.stride()[:-1]) and view.stride(1) == 32
