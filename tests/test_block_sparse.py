"""Block-sparse masks: _flash_attn_fwd(block_sparse_tensors=), upstream's convention."""

import pytest
import torch

from . import block_masks, harness
from .cases import BF16, F32, MASKS, Case
from .oracle import Rule
from .test_mods import documents

# (queries, keys) of a block; tiles of the kernels are no multiples of most of them
SIZES = ((128, 128), (64, 32), (16, 8), (48, 200))


def kinds_of(case: Case, block_size: tuple[int, int], per_head: bool) -> torch.Tensor:
    """Random kinds; the first block of queries has no keys at all."""
    rows, keys = (-(-n // size) for n, size in zip((case.seqlens_q[0], case.seqlens_k[0]),
                                                   block_size, strict=True))  # fmt: skip
    outer = (case.batch, case.heads) if per_head else (1, 1)
    kinds = torch.randint(0, 3, (*outer, rows, keys))
    kinds[:, :, 0] = 0
    return kinds


def check(
    fa4, case: Case, kinds: torch.Tensor, block_size: tuple[int, int], mask_mod, device, **more
):
    """The answer to `case` under the lists of `kinds` is the oracle's under the mask they mean."""
    call = harness.build(case, device)
    call.rule = Rule(
        causal=case.causal, window=case.window,
        mask_mod=block_masks.as_mask_mod(kinds.to(device), block_size, mask_mod),
    )  # fmt: skip
    left, right = case.window
    out, lse = fa4.interface._flash_attn_fwd(
        call.q, call.k, call.v, causal=case.causal, window_size_left=left, window_size_right=right,
        block_sparse_tensors=block_masks.lists(kinds.to(device), block_size), mask_mod=mask_mod,
        return_lse=True, **call.tensors, **more,
    )  # fmt: skip
    harness.judge(call, harness.cut(call, out, lse))


@pytest.mark.parametrize("mask", ["full", "causal", "band"])
@pytest.mark.parametrize("per_head", [False, True], ids=["shared", "per_head"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_lists(fa4, device, size, per_head, mask):
    """Partial blocks with and without a mask_mod, a band mask besides."""
    case = Case(
        name="block_sparse", d=64, seqlens_q=(300, 300), seqlens_k=(410, 410), heads=2, heads_kv=1,
        dtype=F32 if device.type == "cpu" else BF16, **MASKS[mask],
    )  # fmt: skip
    kinds = kinds_of(case, size, per_head)
    check(fa4, case, kinds, size, documents if per_head else None, device)


def given(**changes):
    """Keyword arguments of a call that is right, but for `changes` of its lists."""
    q = torch.randn(1, 32, 2, 16)
    tensors = block_masks.lists(torch.ones(1, 1, 1, 1, dtype=torch.int64), (128, 128))
    vars(tensors).update(changes)
    return {"q": q, "k": q, "v": q, "block_sparse_tensors": tensors}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": None}, "block_size=None: must be"),
        ({"block_size": (100, 128)}, "block_size=.100, 128.: must be multiples of 16"),
        ({"mask_block_cnt": torch.ones(1, 1, 1)}, "mask_block_cnt.dtype=torch.float32"),
        ({"mask_block_cnt": torch.ones(1, 1, 2, dtype=torch.int32)}, r"mask_block_cnt.shape=\(1"),
        ({"cu_total_m_blocks": torch.ones(1)}, "cu_total_m_blocks=tensor: block lists of packed"),
    ],
    ids=["no_size", "odd_size", "dtype", "shape", "packed"],
)
def test_wrong_lists(fa4, changes, message):
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=message):
        fa4.interface._flash_attn_fwd(**given(**changes))


@pytest.mark.parametrize("name", ["seqused_q", "seqused_k", "page_table"])
def test_lists_of_what_is_not_dense_are_refused(fa4, name):
    """On every device: no kernel is asked for lists of pages, which nobody has tried."""
    other = torch.zeros((1, 2) if name == "page_table" else 1, dtype=torch.int32)
    with pytest.raises(NotImplementedError, match=f"block_sparse_tensors=given with {name}"):
        fa4.interface._flash_attn_fwd(**given(), **{name: other})


def test_lists_have_no_gradient(fa4):
    arguments = given()
    arguments["q"].requires_grad_()
    with pytest.raises(NotImplementedError, match="block_sparse_tensors=given: has no gradient"):
        fa4.interface._flash_attn_fwd(**arguments)
