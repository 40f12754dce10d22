"""What callers rely on besides numbers: names, aliases, kinds of arguments, and plain answers."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

HEADS, KV_HEADS, DIM = 4, 2, 16


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.fixture
def packed():
    """q, k, v, cu_seqlens_q, cu_seqlens_k of two sequences."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, h, DIM) for n, h in ((6, HEADS), (10, KV_HEADS), (10, KV_HEADS)))
    return q, k, v, ints(0, 2, 6), ints(0, 5, 10)


def test_public_names(fa4):
    """All of them, documented, and nothing else."""
    assert set(fa4.__all__) == {
        "describe",
        "explain",
        "flash_attn_combine",
        "flash_attn_func",
        "flash_attn_varlen_func",
        "flash_attn_with_kvcache",
        "get_scheduler_metadata",
        "merge_attention_states",
        "use_in_transformers",
    }
    for name in fa4.__all__:
        text = inspect.getdoc(getattr(fa4, name))
        assert "Returns:" in text and "{" not in text.replace("{@", "")


@pytest.mark.parametrize(
    ("function", "names"),
    [
        ("flash_attn_func", "dropout_p window_size deterministic softcap s_aux"),
        (
            "flash_attn_varlen_func",
            "dropout_p window_size deterministic softcap s_aux max_seqlen_q max_seqlen_k",
        ),
        ("flash_attn_with_kvcache", "window_size softcap s_aux block_table cache_seqlens"),
    ],
)
def test_names_that_transformers_looks_for(fa4, function, names):
    """transformers passes an option only if the signature names it; sinks are dropped silently."""
    assert set(names.split()) <= set(inspect.signature(getattr(fa4, function)).parameters)


@pytest.mark.parametrize(
    "kind", [int, np.int32, np.int64, torch.tensor], ids=["int", "int32", "int64", "tensor"]
)
def test_kinds_of_integers(fa4, packed, kind):
    """A length may be an int, a NumPy integer or a 0-d tensor: the same problem and result."""
    problem = fa4.flash_attn4_cute.problem
    expected = fa4.flash_attn_varlen_func(*packed, 4, 5)
    assert torch.equal(fa4.flash_attn_varlen_func(*packed, kind(4), kind(5)), expected)
    options = problem.AttentionOptions(max_seqlen_q=kind(4), num_splits=kind(1))
    assert options == problem.AttentionOptions(max_seqlen_q=4, num_splits=1)
    assert type(options.max_seqlen_q) is int


def test_a_maximum_on_a_device_is_derived_from_the_shapes(fa4):
    """It is not read; what is no 0-d integer is refused as ever."""
    options = fa4.flash_attn4_cute.problem.AttentionOptions
    there = torch.tensor(4, device="meta")
    assert options(max_seqlen_q=there, max_seqlen_k=there) == options()
    for wrong in (there.float(), there[None]):
        with pytest.raises(TypeError, match="max_seqlen_q"):
            options(max_seqlen_q=wrong)


def test_the_same_call_is_the_same_problem(fa4, packed):
    """Calls that differ in values only share one problem, so nothing is planned twice."""
    problem = fa4.flash_attn4_cute.problem

    def pose(q, k, v, softcap=0.0):
        tensors = problem.AttentionTensors(q=q, k=k, v=v)
        return problem.AttentionProblem.from_tensors(
            tensors, problem.AttentionOptions(softcap=softcap)
        )

    q, k, v = (t[None] for t in packed[:3])
    first = pose(q, k, v)
    assert pose(q.clone(), k.clone(), v) is first
    assert pose(q, k, v, softcap=1.0) is not first
    assert pose(q[:, :3], k, v) != first
    storage = torch.empty(q.numel() + 1)
    unaligned = storage[1:].view(q.shape).copy_(q)
    assert first.aligned and not pose(unaligned, k, v).aligned


@pytest.mark.parametrize(
    ("causal", "window", "same_as"),
    [
        (False, None, (-1, -1)),
        (False, [-1, -1], (None, None)),
        (True, None, (-1, 0)),
        (True, (-1, -1), (None, 0)),
        (True, (3, 3), [3, 0]),
        (True, (3, -1), (np.int64(3), 0)),
        (False, (10, 10), (-1, -1)),
    ],
)
def test_windows_that_mean_the_same(fa4, packed, causal, window, same_as):
    """causal is the window (-1, 0); with another window it is the intersection."""
    a = fa4.flash_attn_varlen_func(*packed, causal=causal, window_size=window)
    b = fa4.flash_attn_varlen_func(*packed, window_size=same_as)
    assert torch.equal(a, b)


def test_aliases(fa4, packed):
    """Two names of one argument give one result."""
    sink = torch.linspace(-1, 1, HEADS)
    a = fa4.flash_attn_varlen_func(*packed, s_aux=sink)
    b = fa4.flash_attn_varlen_func(*packed, learnable_sink=sink)
    assert torch.equal(a, b)
    q, k, v, cu_q, cu_k = packed
    pages = [t.view(5, 2, KV_HEADS, DIM) for t in (k, v)]
    table = ints(0, 1, 2, 3, 4, -1).view(2, 3)
    by_lengths = fa4.flash_attn_varlen_func(
        q, *pages, cu_q, seqused_k=ints(6, 4), block_table=table
    )
    by_cu = fa4.flash_attn_varlen_func(q, *pages, cu_q, ints(0, 6, 10), page_table=table)
    assert torch.equal(by_lengths, by_cu)


def test_what_serving_engines_call(fa4, packed):
    """_flash_attn_fwd: always a pair; None or -1 for no limit; None and False are not requests."""
    q, k, v, cu_q, cu_k = packed
    out, lse = fa4.flash_attn_varlen_func(*packed, causal=True, return_lse=True)
    lengths = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    found, nothing = fa4._flash_attn_fwd(
        q, k, v, **lengths, causal=True, window_size_left=-1, qv=None, fp8_kv_dequant=False
    )
    assert torch.equal(found, out) and nothing is None
    given_out, given_lse = torch.empty_like(out), torch.empty_like(lse)
    pair = fa4._flash_attn_fwd(
        q, k, v, **lengths, causal=True, out=given_out, lse=given_lse, return_lse=True
    )
    assert pair[0] is given_out and pair[1] is given_lse
    assert torch.equal(given_out, out) and torch.equal(given_lse, lse)


def test_metadata_settles_the_splits(fa4, packed):
    """What was decided once a step is what the call does."""
    q, k, v, cu_q, cu_k = packed
    made = fa4.get_scheduler_metadata(
        2, 4, 5, HEADS, KV_HEADS, DIM, ints(5, 5), cu_seqlens_q=cu_q, num_splits=2
    )
    assert made.num_splits == 2
    a = fa4.flash_attn_varlen_func(*packed, num_splits=2)
    b = fa4.flash_attn_varlen_func(*packed, scheduler_metadata=made)
    assert torch.equal(a, b)


def test_describe_names_the_variant_and_why(fa4):
    """One line a device."""
    text = fa4.describe()
    assert "variant" in text and "because" in text
    if not torch.cuda.is_available():
        assert text.startswith("variant cpu") and "no CUDA device" in text


def test_explain_takes_the_arguments_of_a_call(fa4, packed):
    """And raises what the call would raise."""
    text = fa4.explain(*packed, causal=True, num_splits=3)
    assert "variant cpu" in text and "3 split(s)" in text and "varlen" in text
    dense = [t[None] for t in packed[:3]]
    assert "dense" in fa4.explain(*dense, window_size=(3, 0))
    with pytest.raises(ValueError, match="softcap=-1.0"):
        fa4.explain(*dense, softcap=-1.0)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        fa4.explain(*dense, softmax_scal=None)
    assert "dense" in fa4.explain(*dense, qv=None, cache_leftpad=None, return_attn_probs=False)
    with pytest.raises(TypeError, match="describe neither attends nor merges"):
        fa4.explain(fa4.describe)

    def write(t):
        t.fill_(7.0)

    kept = packed[0].clone()
    with pytest.raises(TypeError, match=r"explain: .*test_interface\..*write is no function of"):
        fa4.explain(write, packed[0])
    assert torch.equal(packed[0], kept)
