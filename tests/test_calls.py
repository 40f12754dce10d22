"""What a call does beside computing: what it writes and when, and what it takes for an argument.

Without a GPU, calls are planned for an H200 as benchmarks/benchmark_calls.py does, and kernels that
note that they were launched take the place of compiled ones.
"""

import importlib
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.benchmark_calls import no_driver

from .cases import BF16

SENTINEL = 7.0


def module(fa4, name):
    return importlib.import_module(f"{fa4.__name__}.{name}")


def int32(*values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def normal(*shape, dtype=BF16):
    return torch.randn(shape).to(dtype)


@pytest.fixture
def launches(fa4, monkeypatch):
    """What calls on CPU tensors launch on an H200: the keys of the kernels, in order."""
    found = []
    compiler = module(fa4, "flash_attn4_cute.compiler")
    monkeypatch.setattr(compiler, "compiled", lambda key: lambda arguments: found.append(key))
    make_plan = module(fa4, "flash_attn4_cute.plan").make_plan
    make_plan.cache_clear()
    with torch.no_grad(), no_driver(fa4):
        yield found
    make_plan.cache_clear()


@pytest.fixture
def short_way(fa4, monkeypatch):
    """Calls on CPU tensors go to an H200 by a compiled kernel, and are remembered."""
    drivers, execute = module(fa4, "flash_attn4_cute.launcher.driver"), module(fa4, "execute")
    found = SimpleNamespace(filled=[], repeats=execute.repeats)
    monkeypatch.setattr(drivers.Driver, "fill", lambda self, *fill: found.filled.append(fill))
    module(fa4, "flash_attn4_cute.plan").make_plan.cache_clear()
    execute.repeats.clear()
    with torch.no_grad(), no_driver(fa4):
        yield found
    execute.repeats.clear()
    module(fa4, "flash_attn4_cute.plan").make_plan.cache_clear()


def packed(**options):
    """Arguments of _flash_attn_fwd with two sequences, and three rows that belong to none."""
    q, kv, starts = normal(9, 4, 64), normal(9, 2, 64), int32(0, 4, 6)
    given = {"q": q, "k": kv, "v": kv, "cu_seqlens_q": starts, "cu_seqlens_k": starts}
    return given | {"max_seqlen_q": 4, "max_seqlen_k": 4, "num_splits": 1, **options}


def names(keys):
    return [type(key).__name__ for key in keys]


def cached(**options):
    """Arguments of flash_attn_with_kvcache that append a token to each of 2 sequences."""
    q, new, cache = normal(2, 1, 8, 64), (2, 1, 2, 64), (2, 32, 2, 64)
    given = {"k_cache": torch.full(cache, SENTINEL).to(BF16), "v_cache": normal(*cache)}
    given |= {"k": normal(*new), "v": normal(*new), "cache_seqlens": int32(3, 9)}
    return {"q": q, **given, "causal": True, **options}


# --- Nothing is written before a refusal ----------------------------------------------------------


@pytest.mark.parametrize("missing", ["AppendKey", "DecodeKey"])
def test_no_kernel_runs_unless_all_are_there(fa4, launches, monkeypatch, missing):
    """FLASH_ATTN_4_JIT=0, say: the cache is as it was when the kernel that reads it is missing."""
    fa4.flash_attn_with_kvcache(**cached())
    assert names(launches) == ["AppendKey", "DecodeKey"]
    compiler = module(fa4, "flash_attn4_cute.compiler")
    have = compiler.compiled

    def compiled(key):
        if type(key).__name__ == missing:
            raise RuntimeError("FLASH_ATTN_4_JIT=0")
        return have(key)

    launches.clear()
    monkeypatch.setattr(compiler, "compiled", compiled)
    with pytest.raises(RuntimeError, match="JIT=0"):
        fa4.flash_attn_with_kvcache(**cached())
    assert not launches


def test_results_are_not_touched_unless_the_kernel_is_there(fa4, launches, monkeypatch):
    """Nor are memory and -inf written to the LSE that a caller gives."""
    compiler = module(fa4, "flash_attn4_cute.compiler")
    loading = []

    class Broken(module(fa4, "flash_attn4_cute.launcher.kernel").Kernel):
        def __init__(self):
            pass

        def load(self, device):
            loading.append(device)
            raise RuntimeError("no room for machine code")

    monkeypatch.setattr(compiler, "compiled", lambda key: Broken())
    q, starts = normal(8, 4, 64), int32(0, 6)
    out, lse = torch.full_like(q, SENTINEL), torch.full((4, 8), SENTINEL)
    given = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "out": out, "lse": lse}
    with pytest.raises(RuntimeError, match="no room"):
        fa4._flash_attn_fwd(q, q, q, **given)
    assert loading == [0]
    assert (out == SENTINEL).all() and (lse == SENTINEL).all()


def test_a_merge_is_refused_before_out_is_written(fa4, launches, monkeypatch):
    """More parts than one launch merges are merged in groups first: into memory of our own."""
    written, parts = [], 300
    compiler = module(fa4, "flash_attn4_cute.compiler")

    def compiled(key):
        if key.out_dtype == BF16:
            raise RuntimeError("FLASH_ATTN_4_JIT=0")
        return lambda arguments: written.append(arguments.mO.data_ptr())

    monkeypatch.setattr(compiler, "compiled", compiled)
    out = torch.full((1, 2, 4, 64), SENTINEL).to(BF16)
    with pytest.raises(RuntimeError, match="JIT=0"):
        fa4.flash_attn_combine(normal(parts, *out.shape), torch.zeros(parts, 1, 2, 4), out=out)
    assert (out == SENTINEL).all() and out.data_ptr() not in written


# --- Rows that belong to no sequence --------------------------------------------------------------


def sparse(device, keys: int):
    """Arguments, and which rows belong to a sequence: of packed queries, and of dense ones."""
    q, kv = normal(9, 4, 64).to(device), normal(keys, 2, 64).to(device)
    starts, ends = int32(0, 4, 6, device=device), int32(0, keys // 2, keys, device=device)
    used, rows = int32(3, 2, device=device), torch.arange(9, device=device)
    packed = {"q": q, "k": kv, "v": kv, "cu_seqlens_q": starts, "cu_seqlens_k": ends}
    dense = {"q": q[:8].view(2, 4, 4, 64), "k": kv[None].expand(2, -1, -1, -1)}
    return {
        "packed": (packed, rows < 6),
        "packed, used": (packed | {"seqused_q": used}, (rows < 3) | (rows == 4) | (rows == 5)),
        "dense, used": (
            dense | {"v": dense["k"], "seqused_q": used},
            rows[:4] < used[:, None],
        ),
    }


@pytest.mark.parametrize("keys", [8, 0])
@pytest.mark.parametrize("name", ["packed", "packed, used", "dense, used"])
def test_rows_of_no_sequence(fa4, device, name, keys):
    """0 and -inf where results are made here; what is given keeps them, on every device."""
    arguments, inside = sparse(device, keys)[name]
    for _ in range(2):  # the second call goes the short way
        out, lse = fa4._flash_attn_fwd(**arguments, return_lse=True)
        lse = lse.transpose(-1, -2)
        assert (out[~inside] == 0).all() and (lse[~inside] == -torch.inf).all()
        given, given_lse = torch.full_like(out, SENTINEL), torch.full_like(lse, SENTINEL)
        given_lse = given_lse.transpose(-1, -2).contiguous()
        fa4._flash_attn_fwd(**arguments, out=given, lse=given_lse)
        assert torch.equal(given[inside], out[inside])
        assert torch.equal(given_lse.transpose(-1, -2)[inside], lse[inside])
        assert (given[~inside] == SENTINEL).all()
        assert (given_lse.transpose(-1, -2)[~inside] == SENTINEL).all()


@pytest.mark.parametrize("used", [None, (1, 2)])
def test_rows_before_the_first_sequence(fa4, used):
    """Belong to none: a GPU does not look whether the first one starts at 0."""
    results, problem = (module(fa4, f"flash_attn4_cute.{x}") for x in ("results", "problem"))
    q = normal(8, 1, 8)
    tensors = problem.AttentionTensors(q=q, k=q, v=q, cu_seqlens_q=int32(2, 4, 6))
    tensors.seqused_q = None if used is None else int32(*used)
    inside = results._rows_of_sequences(tensors).nonzero().flatten().tolist()
    assert inside == ([2, 3, 4, 5] if used is None else [2, 4, 5])


def test_fills_of_a_repeated_call(fa4, short_way):
    """The short way fills what it allocates and nothing else."""
    arguments, filled = packed(), short_way.filled
    out, lse = torch.empty_like(arguments["q"]), torch.empty(4, 9)
    for given, count in (({"out": out, "lse": lse}, 0), ({"lse": lse}, 1), ({"out": out}, 1)):
        for _ in range(2):
            filled.clear()
            found = fa4._flash_attn_fwd(**arguments, **given, return_lse=True)
        assert len(filled) == count and len(short_way.repeats) == 1
        addresses = {x.data_ptr() for x in given.values()}
        assert not addresses & {address for address, *_ in filled}
        assert all(x.data_ptr() in addresses | {filled[0][0]} for x in found if filled)
        short_way.repeats.clear()


def test_compiled_calls_have_no_garbage_there(fa4):
    """Where torch.compile sees results be given to an operator, those made for it are cleared."""
    torch._dynamo.reset()
    call, arguments = fa4._flash_attn_fwd, sparse(torch.device("cpu"), 8)["packed"][0]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    given = torch.full((4, 9), SENTINEL)
    torch.use_deterministic_algorithms(True)  # new memory is NaN then
    try:
        with torch.no_grad():
            out, lse = compiled(**arguments, lse=given)
            _, made = compiled(**arguments, out=torch.empty_like(out), return_lse=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert (out[6:] == 0).all() and (lse[:, 6:] == SENTINEL).all()
    assert (made[:, 6:] == -torch.inf).all()


def test_a_result_lies_apart_from_what_is_read(fa4):
    """out in memory of q, k or v is refused; columns of one buffer that only alternate are not."""
    q, k, v = (torch.randn(1, 8, 2, 16) for _ in range(3))
    expected = fa4.flash_attn_func(q, k, v)
    for name, x in {"q": q, "k": k, "v": v}.items():
        with pytest.raises(ValueError, match=f"out=memory of {name}: .* Pass another tensor"):
            fa4.flash_attn_func(q, k, v, out=x)
    with pytest.raises(ValueError, match=r"out.stride=\(256, 0, 16, 1\): .* not expanded"):
        fa4.flash_attn_func(q, k, v, out=torch.zeros(1, 8, 2, 16)[:, :1].expand(1, 8, 2, 16))
    for lse, match in {
        torch.zeros(1, 1, 8).expand(1, 2, 8): r"lse.stride=.* not expanded",
        q.view(-1)[:16].view(1, 2, 8): "lse=memory of q",
    }.items():
        with pytest.raises(ValueError, match=match):
            fa4._flash_attn_fwd(q, k, v, lse=lse)
    room = torch.zeros(10 * 32)
    shifted = room[32:288].view(q.shape).copy_(q)
    with pytest.raises(ValueError, match="out=memory of q"):
        fa4.flash_attn_func(shifted, k, v, out=room[:256].view(q.shape))
    buffer = torch.zeros(1, 8, 2, 64)
    *parts, out = buffer.split(16, dim=-1)
    for part, x in zip(parts, (q, k, v), strict=True):
        part.copy_(x)
    fa4.flash_attn_func(*parts, out=out)
    torch.testing.assert_close(out, expected)
    table, new = int32(0, 1).view(1, 2), torch.randn(1, 1, 2, 16)
    pages = [x.reshape(2, 4, 2, 16) for x in (k, v)]
    given = pages[1].view(8, 1, 2, 16)[:1]
    with pytest.raises(ValueError, match="out=memory of v_cache"):
        fa4.flash_attn_with_kvcache(
            new, *pages, new, new, cache_seqlens=int32(7), block_table=table, out=given
        )


def test_a_repeated_call_sees_it_too(fa4, short_way):
    """And one that would forget a gradient is no repetition of one that needs none."""
    arguments = packed()
    for _ in range(3):
        fa4._flash_attn_fwd(**arguments, out=torch.empty_like(arguments["q"]))
    assert len(short_way.repeats) == 1
    lse, rows, given = torch.zeros(4, 9), normal(12, 4, 64), arguments | {"q": None}
    cases = {"out=memory of q": (rows[:9], rows[3:], None)}
    cases["lse=memory of q"] = (rows[:9], None, rows.view(torch.float32).flatten()[:36].view(4, 9))
    cases["lse=memory of out"] = (normal(9, 4, 64), rows[:9], cases["lse=memory of q"][2])
    for match, (q, out, shared) in cases.items():
        given |= {"q": q, "return_lse": True}
        fa4._flash_attn_fwd(**given, out=torch.empty_like(q), lse=lse)
        with pytest.raises(ValueError, match=match):
            fa4._flash_attn_fwd(**given, out=out, lse=shared)
    columns = [torch.zeros(9, 16, 64, dtype=BF16).split((4, 2, 2, 8), 1) for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        for q, k, v, other in (columns[0], *columns):  # which of these alternate goes the short way
            given |= {"q": q, "k": k, "v": v}
            fa4._flash_attn_fwd(**given, out=other[:, :4])
            patch.setattr(module(fa4, "request"), "send", None)
    with pytest.raises(ValueError, match="out=memory of v"):
        fa4._flash_attn_fwd(**given, out=columns[1][2].as_strided(q.shape, q.stride()))
    key_of = module(fa4, "flash_attn4_cute.repeat").key_of
    qkv, others = [arguments[name] for name in "qkv"], [None] * 13
    others[-1] = torch.rand(4)
    assert key_of((), None, tuple(qkv), tuple(others), None) is not None
    others[-1].requires_grad_()
    assert key_of((), None, tuple(qkv), tuple(others), None) is not None
    with torch.enable_grad():
        assert key_of((), None, tuple(qkv), tuple(others), None) is None


@pytest.mark.parametrize("name", ["cpu", "short_way"])
def test_a_merge_lies_apart_from_what_is_read(fa4, request, name):
    """Or is one of the parts: each row is read before it is written, on every device."""
    if name != "cpu":
        request.getfixturevalue(name)
    room, buffer = torch.randn(4 * 512), torch.randn(512)
    sums = buffer[:24].view(3, 1, 2, 4)
    parts, part = room[:1536].view(3, 1, 2, 4, 64), (1, 2, 4, 64)
    expected = fa4.flash_attn_combine(parts, sums, out=torch.zeros(part))[0]
    refused = {
        "out=memory of out_partial": room[64:576].view(part),
        "out=memory of lse_partial": buffer.view(part),
        "out.stride=.* not expanded": torch.zeros(64).expand(part),
    }
    for match, out in refused.items():
        with pytest.raises(ValueError, match=match):
            fa4.flash_attn_combine(parts, sums, out=out)
    found = fa4.flash_attn_combine(parts, sums, out=parts[1])[0]
    assert found.data_ptr() == parts[1].data_ptr()
    if name == "cpu":
        assert torch.equal(found, expected)


# --- What an argument may be ----------------------------------------------------------------------


def answer(call):
    try:
        return type(call())
    except (TypeError, ValueError) as error:
        return type(error), str(error)


EQUAL = {
    "pack_gqa": (True, [1, 1.0, np.True_, torch.tensor(True)]),
    "num_splits": (1, [True, 1.0, 1 + 0j, np.int64(1), np.float32(1), torch.tensor(1)]),
    "causal": (True, [1, np.True_, torch.tensor(1)]),
    "window_size": ((1, 0), [(True, False), [1, 0], (1.0, 0), (np.int8(1), torch.tensor(0))]),
    "softcap": (1.0, [1, True, np.float16(1), torch.tensor(1)]),
    "max_seqlen_q": (4, [4.0, np.int32(4), torch.tensor(4)]),
    "max_seqlen_k": (4, [4.0, np.int32(4), torch.tensor(4)]),
}


@pytest.mark.parametrize("name", EQUAL)
def test_a_number_counts_by_its_value(fa4, name):
    """The answer is that to the equal number, be the call the first of its kind or not."""
    good, others = EQUAL[name]
    cold = module(fa4, "request")._kept_options_of.cache_clear
    arguments = packed() | {"pack_gqa": None}
    call = {x: arguments.pop(x) for x in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")}
    arguments |= call
    expected = fa4.flash_attn_varlen_func(**arguments | {name: good})
    for value in others:
        for before in (cold, lambda: fa4.flash_attn_varlen_func(**arguments | {name: good})):
            before()
            assert torch.equal(fa4.flash_attn_varlen_func(**arguments | {name: value}), expected), (
                value
            )


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_splits", 1.5), ("num_splits", "1"), ("num_splits", float("nan")), ("pack_gqa", 2)],
)
def test_no_other_number_does(fa4, name, value):
    call = packed() | {name: value}
    with pytest.raises(TypeError, match=f"{name}={value!r}"):
        fa4.flash_attn_varlen_func(**call)


@pytest.mark.parametrize("strides", [(1, 2), (5, 7)])
def test_one_page_a_sequence_has_any_strides(fa4, device, strides):
    """A table (b, 1) is contiguous whatever the stride of its last dimension says."""
    q, pages = normal(2, 1, 4, 64).to(device), normal(4, 16, 2, 64).to(device)
    lengths, table = int32(9, 16, device=device), int32(3, 1, device=device).view(2, 1)
    odd = torch.zeros(9, dtype=torch.int32, device=device).as_strided((2, 1), strides)
    odd.copy_(table)
    call = {"q": q, "k_cache": pages, "v_cache": pages, "cache_seqlens": lengths}
    first = fa4.flash_attn_with_kvcache(**call, block_table=odd)
    assert torch.equal(first, fa4.flash_attn_with_kvcache(**call, block_table=table))


WINDOWS = [[1, 0], (np.int64(1), 0), (torch.tensor(1), 0)]
BOUNDS = [np.int64(4), np.int32(4), torch.tensor(4), torch.tensor(4, device="meta"), None]


def test_every_spelling_takes_the_short_way(fa4, short_way, monkeypatch):
    """Lists, NumPy's numbers and tensors find the call that plain numbers left."""
    request, given = module(fa4, "request"), packed()
    del given["num_splits"]
    spellings = [{"max_seqlen_q": x, "max_seqlen_k": x} for x in BOUNDS]
    spellings += [{"window_size": x} for x in WINDOWS]
    for same in ({}, {"max_seqlen_q": None, "max_seqlen_k": None}, {"window_size": (1, 0)}):
        fa4.flash_attn_varlen_func(**given | same)
    known = len(short_way.repeats)
    monkeypatch.setattr(request, "send", None)
    for spelling in spellings:
        fa4.flash_attn_varlen_func(**given | spelling)
    assert len(short_way.repeats) == known == 3


# --- What explain says ----------------------------------------------------------------------------


@pytest.fixture
def explained(fa4, launches, monkeypatch):
    """What explain says of a call on an H200, while nothing may be compiled or launched."""
    compiler = module(fa4, "flash_attn4_cute.compiler")
    monkeypatch.setattr(compiler, "compiled", None)

    def explain(*arguments, **keywords):
        kept = [x.clone() for x in (*arguments, *keywords.values()) if isinstance(x, torch.Tensor)]
        text = fa4.explain(*arguments, **keywords)
        now = [x for x in (*arguments, *keywords.values()) if isinstance(x, torch.Tensor)]
        assert all(map(torch.equal, kept, now)) and not launches
        return text

    return explain


def test_explain_names_every_kernel_of_a_call(fa4, explained):
    """Of an append and its attention, of a merge of parts, and that where nothing is launched."""
    text = explained(**cached(num_splits=3))
    assert "append: a kernel" in text and "decode for sm90a" in text and "splits: 3, merged" in text
    assert text.count("\ncode of the append: ") == text.count("\ncode: ") == 1
    plain = cached()
    del plain["k"], plain["v"]
    assert "append" not in explained(**plain) and "decode for sm90a" in explained(**plain)
    parts = normal(3, 1, 2, 4, 64)
    assert "merge: a kernel" in explained(fa4.flash_attn_combine, parts, torch.zeros(3, 1, 2, 4))
    empty = parts[:, :, :0], torch.zeros(3, 1, 0, 4)
    assert "merge: not launched" in explained(fa4.flash_attn_combine, *empty)
    nothing = normal(1, 0, 4, 64)
    assert "not launched" in explained(nothing[:, :0], nothing, nothing)
    assert "sm90a" in explained(fa4._flash_attn_fwd, **packed())


@pytest.mark.parametrize("name", ["return_lse", "return_softmax_lse"])
def test_explain_heeds_every_argument(fa4, explained, launches, monkeypatch, name):
    """It speaks of the kernel that the call then asks for."""
    q, told = normal(1, 512, 4, 64), []
    compiler = module(fa4, "flash_attn4_cute.compiler")
    monkeypatch.setattr(compiler, "origin", lambda key: told.append(key) or "somewhere")
    for options in ({}, {name: True}, {"pack_gqa": True}, {"window_size": [9, 0]}):
        explained(q, q, q, **options)
    monkeypatch.setattr(compiler, "compiled", lambda key: lambda _: launches.append(key))
    for options in ({}, {name: True}, {"pack_gqa": True}, {"window_size": [9, 0]}):
        fa4.flash_attn_varlen_func(q, q, q, **options)
    assert told == launches and len(set(told)) == 4


def test_explain_raises_what_the_call_raises(fa4):
    """What only the values show, what metadata were made for, and what an update must be."""
    (q, starts), down = (normal(8, 2, 32, dtype=torch.float32), int32(0, 8)), int32(0, 6, 4)
    made = fa4.get_scheduler_metadata(7, 8, 8, 2, 2, 32, int32(*[1] * 7), cu_seqlens_q=starts)
    varlen = {"q": q, "k": q, "v": q, "cu_seqlens_q": starts, "cu_seqlens_k": starts}
    cases = [
        (fa4.flash_attn_varlen_func, varlen | {"cu_seqlens_q": down, "cu_seqlens_k": down}),
        (fa4.flash_attn_varlen_func, varlen | {"scheduler_metadata": made}),
        (fa4.flash_attn_varlen_func, varlen | {"num_splits": 0.5}),
        (fa4.flash_attn_with_kvcache, cached(cache_seqlens=int32(3, 32))),
        (fa4.flash_attn_with_kvcache, cached(v=None)),
        (fa4.flash_attn_with_kvcache, cached(cache_seqlens="9")),
    ]
    for function, arguments in cases:
        with pytest.raises((TypeError, ValueError)) as called:
            function(**arguments)
        for first in ((), (function,)):
            with pytest.raises(called.type, match=f"^{re.escape(str(called.value))}$"):
                fa4.explain(*first, **arguments)
    assert "append: PyTorch" in fa4.explain(**cached())
