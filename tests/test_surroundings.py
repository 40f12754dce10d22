"""Calls amid other settings and transforms of PyTorch, and a caller's functions with slips."""

import pytest
import torch

from .error_cases import ints

CU_Q, CU_K, EACH, LENGTHS = ints(0, 5, 12), ints(0, 7, 16), ints(0, 1, 2), ints(3, 4)
SLOPES, TABLE = torch.ones(4), torch.ones(20, 8)


def tokens():
    gen = torch.Generator().manual_seed(0)
    sizes = ((6, 4), (8, 2), (8, 2))
    return [torch.randn(2, n, h, 16, generator=gen, device="cpu") for n, h in sizes]


def decode(fa4, q, k, v, **options):
    return fa4.flash_attn_with_kvcache(
        q, k.clone(), v.clone(), k[:, :1], v[:, :1], causal=True, cache_seqlens=LENGTHS,
        rotary_cos=TABLE, rotary_sin=TABLE, **options,
    )  # fmt: skip


CALLS = {
    "window_slopes": lambda fa4, q, k, v: fa4.flash_attn_func(
        q, k, v, window_size=(3, 2), alibi_slopes=SLOPES
    ),
    "dropout": lambda fa4, q, k, v: fa4.flash_attn_func(q, k, v, dropout_p=0.2, num_splits=2),
    "mask_mod": lambda fa4, q, k, v: fa4.flash_attn_func(
        q, k, v, mask_mod=lambda b, h, i, j, info, aux: i >= j - 2
    ),
    "no_keys": lambda fa4, q, k, v: fa4.flash_attn_func(q, k[:, :0], v[:, :0]),
    "packed": lambda fa4, q, k, v: fa4.flash_attn_varlen_func(
        *(x.flatten(0, 1) for x in (q, k, v)), CU_Q, CU_K, 7, 9, causal=True
    ),
    "decode": lambda fa4, q, k, v: decode(fa4, q[:, :1], k, v),
    "decode_packed": lambda fa4, q, k, v: decode(fa4, q[:, 0], k, v, cu_seqlens_q=EACH),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_default_device_does_not_matter(fa4, name):
    answers = []
    for default in ("cpu", "meta"):
        torch.manual_seed(0)
        with torch.device(default):
            answers.append(CALLS[name](fa4, *tokens()))
    assert torch.equal(*answers)


def test_the_default_dtype_does_not_matter(fa4):
    """Sums over many rows are float32 whatever new tensors are."""
    q, k, v = (torch.randn(1, 600, 2, 8) for _ in range(3))
    sink, found = torch.randn(2).requires_grad_(), []
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            out = fa4.flash_attn_func(q, k, v, s_aux=sink, causal=True)
            found += torch.autograd.grad(out.square().sum(), sink)
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(*found)


def test_transforms(fa4):
    """vmap loops over the call; derivatives by torch.func are refused, with a way out."""
    q, k, v = tokens()
    looped = torch.vmap(fa4.flash_attn_func)(q[:, None], k[:, None], v[:, None])
    assert torch.equal(looped[:, 0], fa4.flash_attn_func(q, k, v))
    for derivative in (
        lambda call: torch.func.grad(lambda x: call(x).sum())(q),
        lambda call: torch.func.vjp(call, q),
        lambda call: torch.vmap(torch.func.grad(lambda x: call(x[None]).sum()))(q),
    ):
        with pytest.raises(NotImplementedError, match=r"torch\.func=.*torch\.autograd\.grad"):
            derivative(lambda x: fa4.flash_attn_func(x, k[: len(x)], v[: len(x)]))


@pytest.mark.parametrize("name", ["q", "k", "alibi_slopes"])
def test_tensors_without_strides(fa4, name):
    q, k, v = tokens()
    given = {"q": q, "k": k, "v": v, "alibi_slopes": torch.ones(2, 4)}
    given[name] = given[name].to_sparse()
    with pytest.raises(TypeError, match=rf"{name}=a sparse_coo tensor: .*{name}.to_dense"):
        fa4.flash_attn_func(**given)


def test_none_asks_for_nothing(fa4):
    given = tokens()
    found = fa4.flash_attn_func(*given, dropout_p=None, num_splits=None, softcap=None)
    assert torch.equal(found, fa4.flash_attn_func(*given))


@pytest.mark.parametrize(
    ("name", "function", "message"),
    [
        ("mask_mod", lambda b, h, i, j: i >= j, "mask_mod=.*of 4 .*must take b, h, .*Wrap .*b, h"),
        ("score_mod", lambda s, b, h, i, j: s, "score_mod=.*of 5 .*must take score, .*Wrap"),
        ("mask_mod", lambda *_: None, r"mask_mod\(...\)=NoneType: must return whether"),
        ("score_mod", lambda *_: 0.0, r"score_mod\(...\)=float: must return the scores"),
        ("score_mod", lambda *_: torch.ones(3), r"score_mod\(...\)=a tensor of shape \(3,\)"),
    ],
)
def test_slips_in_functions(fa4, name, function, message):
    with pytest.raises((TypeError, ValueError), match=message):
        fa4.flash_attn_func(*tokens(), **{name: function})
