"""torch.compile sees each public function as one node, and the operators keep their word.

The operators are thin: what they compute is judged elsewhere, here only that compiled and eager
calls agree bit for bit, that shapes are known without running, and that lengths do not recompile.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

BATCH, HEADS, KV_HEADS, DIM = 2, 4, 2, 32
CU_Q = torch.tensor([0, 5, 20], dtype=torch.int32)
CU_K = torch.tensor([0, 12, 30], dtype=torch.int32)


def qkv(sq=20, sk=30, dtype=torch.float32, seed=0):
    """Dense q, k, v from a fixed seed."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(BATCH, sq, HEADS), (BATCH, sk, KV_HEADS), (BATCH, sk, KV_HEADS)]
    return [torch.randn(*s, DIM, generator=generator).to(dtype) for s in shapes]


def packed(seed=0):
    """Packed q, k, v of the lengths in CU_Q and CU_K."""
    return [t[0] for t in qkv(seed=seed)]


def paged():
    """A cache of pages, with its table and lengths."""
    generator = torch.Generator().manual_seed(1)
    cache = [torch.randn(10, 16, KV_HEADS, DIM, generator=generator) for _ in range(2)]
    table = torch.tensor([[3, 7, -1], [0, 9, 4]], dtype=torch.int32)
    return *cache, table, torch.tensor([7, 20], dtype=torch.int32)


PAGED = paged()


def penalise(score, b, h, q_idx, kv_idx, seqlen_info, aux_tensors):
    return score + aux_tensors[0][h] * (q_idx - kv_idx)


def even(b, h, q_idx, kv_idx, seqlen_info, aux_tensors):
    return (q_idx + kv_idx) % 2 == 0


def dense_call(fa4, q, k, v):
    return fa4.flash_attn_func(q, k, v, causal=True, window_size=(5, 0), return_lse=True)


def sink_call(fa4, q, k, v):
    return fa4.flash_attn_func(q, k, v, s_aux=torch.linspace(-1, 1, HEADS), num_splits=3)


def mods_call(fa4, q, k, v):
    slopes = [torch.linspace(0, 0.1, HEADS)]
    return fa4.flash_attn_func(q, k, v, score_mod=penalise, mask_mod=even, aux_tensors=slopes)


def varlen_call(fa4, q, k, v):
    return fa4.flash_attn_varlen_func(q[0], k[0], v[0], CU_Q, CU_K, 15, 18, softcap=3.0)


def paged_call(fa4, q, k, v):
    k_cache, v_cache, table, lengths = PAGED
    return fa4.flash_attn_varlen_func(
        q[:, :3], k_cache, v_cache, seqused_k=lengths, block_table=table, causal=True
    )


def decode_call(fa4, q, k, v):
    return fa4.flash_attn_with_kvcache(q[:, :1], k, v, cache_seqlens=7, return_lse=True)


def metadata_call(fa4, q, k, v):
    lengths = torch.tensor([7, 30], dtype=torch.int32)
    metadata = fa4.get_scheduler_metadata(BATCH, 1, 30, HEADS, KV_HEADS, DIM, lengths, num_splits=2)
    return fa4.flash_attn_with_kvcache(
        q[:, :1], k, v, cache_seqlens=lengths, scheduler_metadata=metadata
    )


def engine_call(fa4, q, k, v):
    out = torch.full_like(q, torch.nan)
    return fa4._flash_attn_fwd(q, k, v, causal=True, return_lse=True, out=out)


def merge_call(fa4, q, k, v):
    a = fa4.flash_attn_func(q, k[:, :10], v[:, :10], return_lse=True)
    b = fa4.flash_attn_func(q, k[:, 10:], v[:, 10:], return_lse=True)
    return fa4.merge_attention_states(*a, *b)


def combine_call(fa4, q, k, v):
    parts = [
        fa4.flash_attn_func(q, k[:, s], v[:, s], return_lse=True) for s in (slice(9), slice(9, 30))
    ]
    return fa4.flash_attn_combine(
        torch.stack([out for out, _ in parts]), torch.stack([lse.mT for _, lse in parts])
    )


CALLS = [
    dense_call,
    sink_call,
    mods_call,
    varlen_call,
    paged_call,
    decode_call,
    metadata_call,
    engine_call,
    merge_call,
    combine_call,
]


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__.removesuffix("_call"))
def test_compiles_in_one_graph(fa4, call):
    """torch.compile(fullgraph=True) gives what eager gives."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: call(fa4, *t), fullgraph=True, backend="aot_eager")
    expected, found = call(fa4, *qkv()), compiled(*qkv())
    for a, b in zip(as_tuple(expected), as_tuple(found), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)


def test_appending_compiles_in_one_graph(fa4):
    """The operator writes the caller's cache, not a copy of it."""
    torch._dynamo.reset()
    k_cache, v_cache, table, lengths = paged()
    q, k, v = (t[:, :3] for t in qkv())
    cos, sin = torch.randn(64, 8), torch.randn(64, 8)

    def call(k_cache, v_cache):
        return fa4.flash_attn_with_kvcache(
            q,
            k_cache,
            v_cache,
            k,
            v,
            cache_seqlens=lengths,
            block_table=table,
            rotary_cos=cos,
            rotary_sin=sin,
            causal=True,
            return_lse=True,
        )

    expected_cache, found_cache = ([t.clone() for t in (k_cache, v_cache)] for _ in range(2))
    expected = call(*expected_cache)
    found = torch.compile(call, fullgraph=True, backend="aot_eager")(*found_cache)
    for a, b in zip((*expected, *expected_cache), (*found, *found_cache), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(found_cache[0], k_cache)
    assert not torch.equal(found_cache[1], v_cache)


def test_compiles_into_a_given_result(fa4):
    """out= is written in place."""
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v, out: fa4.flash_attn_func(q, k, v, out=out, return_lse=True),
        fullgraph=True,
        backend="aot_eager",
    )
    out = torch.full((BATCH, 20, HEADS, DIM), torch.nan)
    result, lse = compiled(*qkv(), out)
    expected, expected_lse = fa4.flash_attn_func(*qkv(), return_lse=True)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    assert result.data_ptr() == out.data_ptr()


def test_gradients_compile_in_one_graph(fa4):
    """Backward is one operator too, for q, k, v and the sink, through out and lse."""
    torch._dynamo.reset()

    def loss(q, k, v, sink):
        out, lse = fa4.flash_attn_func(q, k, v, causal=True, s_aux=sink, return_lse=True)
        return out.square().sum() + lse.sum()

    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        inputs = [t.requires_grad_() for t in (*qkv(sk=20), torch.linspace(-1, 1, HEADS))]
        function(*inputs).backward()
        gradients.append([t.grad for t in inputs])
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_compiled_calls_pose_the_problem_of_eager_ones(fa4, monkeypatch, grad):
    """The kernels that are shipped are for that. There is an LSE if a gradient needs it only."""
    torch._dynamo.reset()
    problems, checked = [], fa4.execute.checked

    def spy(*call):
        problems.append(checked(*call))
        return problems[-1]

    monkeypatch.setattr(fa4.execute, "checked", spy)
    compiled = torch.compile(fa4.flash_attn_func, fullgraph=True, backend="eager")
    q, k, v = qkv()
    q.requires_grad_(grad)
    found = []
    for function in (fa4.flash_attn_func, compiled):
        function(q, k, v, causal=True)
        found.append(problems[-1])
    assert found[0] == found[1] and found[1].return_lse == grad
    with torch.no_grad():  # another graph
        compiled(q, k, v, causal=True)
    assert not problems[-1].return_lse


def test_graphs_that_expected_no_gradient_have_one(fa4):
    """A traced graph, which has no LSE, is given tensors that require a gradient."""

    def causal(q, k, v):
        return fa4.flash_attn_func(q, k, v, causal=True)

    graph = make_fx(causal, tracing_mode="symbolic")(*qkv())
    gradients = []
    for function in (causal, graph):
        inputs = [t.requires_grad_() for t in qkv()]
        function(*inputs).square().sum().backward()
        gradients.append([t.grad for t in inputs])
    for eager, traced in zip(*gradients, strict=True):
        assert torch.equal(traced, eager)


@pytest.mark.parametrize("layout", ["dense", "varlen"])
def test_lengths_do_not_recompile(fa4, layout):
    """One graph for the first length, one with dynamic lengths for all the others."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def dense(q, k, v):
        return fa4.flash_attn_func(q, k, v, causal=True)

    @torch.compile(fullgraph=True, backend=counter)
    def varlen(q, k, v, cu, longest):
        return fa4.flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=True)

    for n in (10, 14, 17, 25, 31):
        q, k, v = qkv(sq=n, sk=n)
        if layout == "dense":
            dense(q, k, v)
        else:
            varlen(q[0], k[0], v[0], torch.tensor([0, 3, n], dtype=torch.int32), n)
    assert counter.frame_count <= 2


def op_arguments(fa4, **changes):
    """Flat arguments of a plain dense call, as the operators take them."""
    problem = fa4.flash_attn4_cute.problem
    q, k, v = qkv()
    tensors = {"q": q, "k": k, "v": v}
    options = {"mask": problem.Band(None, 0)}
    for name, value in changes.items():
        (tensors if name in problem.AttentionTensors.__slots__ else options)[name] = value
    return fa4.ops.flatten(problem.AttentionTensors(**tensors), problem.AttentionOptions(**options))


OPCHECK_CASES = {
    "dense": {},
    "sink": {"sink": torch.linspace(-1, 1, HEADS)},
    "softcap": {"softcap": 3.0, "num_splits": 2},
    "varlen": {
        **dict(zip("qkv", packed(), strict=True)),
        "cu_seqlens_q": CU_Q,
        "cu_seqlens_k": CU_K,
        "max_seqlen_q": 15,
    },
    "dropout": {"dropout_p": 0.25, "dropout_state": torch.tensor([7, 9])},
}


@pytest.mark.parametrize("name", OPCHECK_CASES)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_opcheck_forward(fa4, name, grad):
    """Schema, fake, autograd registration and dynamic shapes, by PyTorch's own test."""
    call = list(op_arguments(fa4, **OPCHECK_CASES[name], requires_grad=grad))
    for i, argument in enumerate(call):
        if isinstance(argument, torch.Tensor) and argument.is_floating_point():
            call[i] = argument.clone().requires_grad_(grad)
    torch.library.opcheck(fa4.ops.forward, tuple(call))


@pytest.mark.parametrize("with_lse", [True, False], ids=["lse", "no_lse"])
def test_opcheck_forward_out(fa4, with_lse):
    out = torch.empty(BATCH, 20, HEADS, DIM)
    lse = torch.empty(BATCH, HEADS, 20) if with_lse else None
    torch.library.opcheck(fa4.ops.forward_out, (out, lse, *op_arguments(fa4)))


def test_opcheck_backward(fa4):
    call = op_arguments(fa4, requires_grad=True, sink=torch.linspace(-1, 1, HEADS))
    out, lse = fa4.ops.forward(*call)
    gradients = torch.randn_like(out), torch.randn_like(lse)
    torch.library.opcheck(fa4.ops.backward, (*gradients, out, lse, *call))


def test_opcheck_with_kvcache(fa4):
    k_cache, v_cache, table, lengths = paged()
    q, k, v = (t[:, :3] for t in qkv())
    call = op_arguments(fa4, q=q, k=k_cache, v=v_cache, page_table=table, seqused_k=lengths)
    update = (k, v, lengths, None, torch.randn(64, 8), torch.randn(64, 8), False)
    torch.library.opcheck(fa4.ops.with_kvcache, (torch.empty_like(q), None, *update, *call))


@pytest.mark.parametrize("call", [dense_call, varlen_call, decode_call, engine_call])
def test_fakes_know_shapes_and_dtypes(fa4, call):
    """Under FakeTensorMode nothing runs and the results look right."""
    expected = as_tuple(call(fa4, *qkv(dtype=torch.bfloat16)))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        found = as_tuple(call(fa4, *(mode.from_tensor(t) for t in qkv(dtype=torch.bfloat16))))
    for a, b in zip(expected, found, strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def test_every_argument_has_one_place(fa4):
    """Flattening and unflattening a call are inverse. Block lists do not travel: refused before."""
    problem = fa4.flash_attn4_cute.problem
    numbers = itertools.count(1)
    q = torch.empty(0)
    names = problem.AttentionTensors.__slots__
    tensors = {n: torch.tensor(next(numbers)) for n in names if n not in ("out", "lse", "blocks")}
    tensors |= {"q": q, "k": q, "v": q, "aux_tensors": (q,)}
    options = problem.AttentionOptions(
        mask=problem.Custom(even, problem.Band(3, 4)),
        softmax_scale=0.5,
        softcap=2.0,
        score_mod=penalise,
        dropout_p=0.1,
        deterministic=True,
        num_splits=7,
        pack_gqa=True,
        max_seqlen_q=11,
        max_seqlen_k=12,
        return_lse=True,
        requires_grad=True,
    )
    call = fa4.ops.flatten(problem.AttentionTensors(**tensors), options)
    back, back_options = fa4.ops.unflatten(call)
    assert back_options == options
    for name, value in tensors.items():
        found = getattr(back, name)
        assert found[0] is q if name == "aux_tensors" else found is value
