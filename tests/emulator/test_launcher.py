"""The launcher passes to a kernel what CuTe DSL's own host code passes, byte for byte.

Padding inside structs and the second half of TMA descriptors, which CuTe DSL leaves as they happen
to be, are compared with nothing: only what a field of the program fills.
"""

import ctypes
import importlib
import math
import random
import threading
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from flash_attn4_cute.kernel_keys import DecodeKey
from flash_attn4_cute.launcher import driver as drivers
from flash_attn4_cute.launcher.kernel import Kernel
from flash_attn4_cute.launcher.translate import translate
from flash_attn4_cute.signature import NUMERIC
from ptx_emulator.launch.host import Launch, bootstrap
from ptx_emulator.launch.tensors import Allocations, wrap

from ..cross_compile import append_keys, decode_keys
from .packaged import wanted


class Recorder(drivers.Driver):
    """A driver that launches nothing."""

    def stream(self, device: int) -> int:
        return 77

    def current_device(self) -> int:
        return 0

    def empty(self, shape, strides, dtype):
        return torch.empty_strided(shape, strides, dtype=dtype)

    def fill(self, address: int, number: int, word: int, stream: int) -> None:
        assert stream == 77
        (ctypes.c_uint32 * number).from_address(address)[:] = [word] * number


@contextmanager
def recorded(module: Any = drivers):
    """The launches of a with block; `module` is the launcher's module of drivers."""
    host, launches = bootstrap(), []
    before = host.on_launch, module.cuda_driver
    kind = type("Recording", (Recorder, module.Driver), {}) if module is not drivers else Recorder
    recorder = kind(host.library)
    host.on_launch, module.cuda_driver = launches.append, lambda: recorder
    try:
        yield launches
    finally:
        host.on_launch, module.cuda_driver = before
    assert host.error is None


class Sizes:
    """Numbers for symbolic sizes: the same for the same symbol, multiples of what it promises."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.chosen: dict[int, int] = {}

    def of(self, size: Any) -> int:
        if isinstance(size, int):
            return size
        return self.chosen.setdefault(id(size), 16 * self.random.randint(1, 5))


def example(standin: Any, sizes: Sizes) -> Any:
    """Something that a launch may pass for what the kernel was traced with."""
    if isinstance(standin, tuple):
        members = [example(member, sizes) for member in standin]
        return type(standin)(*members) if hasattr(standin, "_fields") else tuple(members)
    if standin is None:
        return None
    kind = type(standin).__name__
    if kind == "Float32":
        return sizes.random.random()
    if kind in ("Int32", "Uint32"):
        return sizes.random.randint(1, 300)
    dtype = next(d for d, name in NUMERIC.items() if name is standin.element_type)
    shape = [sizes.of(size) for size in standin.shape]
    room = [*shape[:-1], shape[-1] + 16] if len(shape) > 1 else shape
    # A view of a wider tensor: strides are not those that the shape alone would give.
    return torch.empty(room, dtype=dtype)[..., : shape[-1]]


def keys() -> dict[str, Any]:
    tcgen05 = [key for key in wanted("sm100f") if not isinstance(key, DecodeKey)]
    return {
        "decode-split": next(
            key for name, key in decode_keys("sm120a").items() if name.startswith("sm120a_d128_32")
        ),
        "append": append_keys("sm120a")["sm120a_append_halves"],
        "tcgen05": next(
            k for k in tcgen05 if "head_dim=256" in repr(k) and "softcap=True" in repr(k)
        ),
        "tcgen05-counter": next(k for k in tcgen05 if getattr(k, "counts_tiles", False)),
    }


@pytest.mark.parametrize("name", ["decode-split", "append", "tcgen05", "tcgen05-counter"])
def test_same_bytes_as_cute_dsl(name):
    import cutlass.cute as cute

    key = keys()[name]
    kernel, standins = key.trace()
    host = bootstrap()
    host.set_device(10, 0, 148)
    arch = "sm_100a" if name.startswith("tcgen05") else "sm_120a"
    host.set_arch(arch)
    theirs = cute.compile(
        kernel,
        *standins,
        cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True),
        options=f"--enable-tvm-ffi --gpu-arch {arch}",
    )
    image, program = translate(str(theirs.ir_module), standins)
    assert image == theirs.__cubin__
    ours = Kernel(image, program)
    for seed in range(4):
        sizes = Sizes(seed)
        sizes.chosen[id(standins[0].mK.shape[-2])] = 16  # heads are a multiple of key heads
        (arguments,) = example(standins, sizes)
        with recorded() as launches:
            theirs(wrap(arguments, Allocations()))
            ours(arguments)
        number = len(program.launches)
        assert len(launches) == 2 * number and number == (2 if name == "decode-split" else 1)
        for launch, expected, found in zip(
            program.launches, launches[:number], launches[number:], strict=True
        ):
            assert_same(launch, expected, found)


def assert_same(launch: Any, expected: Launch, found: Launch) -> None:
    for name in ("kernel", "grid", "block", "cluster", "dynamic_smem", "static_smem"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.stream == 77
    said = {number: raw[: 4 * len(words)] for number, words in launch.attributes
            for n, raw in expected.attributes if n == number}  # fmt: skip
    given = dict(found.attributes)
    assert set(given) == {number for number, _ in launch.attributes}
    assert all(given[number].startswith(raw) for number, raw in said.items())
    sizes = [size for size, _ in launch.params]
    assert sizes == [len(p) for p in expected.params] == [len(p) for p in found.params]
    for i, (_, fields) in enumerate(launch.params):
        for field in fields:
            part = slice(field.offset, field.offset + field.size)
            assert found.params[i][part] == expected.params[i][part], (i, field)
    filled = sum(field.size for _, fields in launch.params for field in fields)
    assert filled > 0.6 * sum(sizes) - 64 * sizes.count(128), "little is left to compare"


# --- calls that repeat ----------------------------------------------------------------------------


@pytest.fixture
def on_gpu(fa4, monkeypatch):
    """fa4's launches of CPU tensors, recorded; the kernel is compiled once for all tests."""
    package = f"{fa4.__name__}.flash_attn4_cute"
    names = ("plan", "append_plan", "combine_plan", "device", "launcher.driver", "repeat_merge")
    *planners, device, driver, merges = (importlib.import_module(f"{package}.{n}") for n in names)
    execute, plan = importlib.import_module(f"{fa4.__name__}.execute"), planners[0]
    for planner in planners:
        monkeypatch.setattr(planner, "supported_card", lambda d: device.Card("a card", (12, 0), 4))
    monkeypatch.setattr(execute, "_variant", lambda problem: execute._cuda())
    monkeypatch.setattr(execute, "has_kernels", lambda device: True)
    monkeypatch.setattr(merges, "known", {})
    execute.repeats.clear()
    plan.make_plan.cache_clear()
    with recorded(driver) as launches:
        yield execute, launches
    execute.repeats.clear()
    plan.make_plan.cache_clear()


def tensors(seed: int):
    torch.manual_seed(seed)
    return [torch.randn(2, 200, heads, 64, dtype=torch.bfloat16) for heads in (2, 1, 1)]


def with_other_addresses(params: tuple[bytes, ...], moved: dict[int, int]) -> list[list[int]]:
    words = [np.frombuffer(p[: len(p) // 8 * 8], np.uint64).tolist() for p in params]
    return [[moved.get(word, word) for word in param] for param in words]


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_a_repeated_call_passes_other_addresses_and_nothing_else(fa4, on_gpu, packed, splits, lse):
    """By the shortest way, for q, k and v alone, and by the one that serves all arguments."""
    execute, launches = on_gpu
    first, second = tensors(0), tensors(1)
    options = {"causal": True, "num_splits": splits, "return_lse": lse}
    if packed:
        for qkv in (first, second):
            starts = torch.tensor([0, 200], dtype=torch.int32)
            qkv[:] = [*(t[0] for t in qkv), starts, starts.clone()]
        answers = [
            fa4.flash_attn_varlen_func(*args, 200, 200, **options) for args in (first, second)
        ]
    else:
        answers = [fa4.flash_attn_func(*qkv, **options) for qkv in (first, second)]
    outs = [answer if lse else (answer,) for answer in answers]
    kinds = [[(x.shape, x.stride(), x.dtype, x.device) for x in found] for found in outs]
    assert kinds[0] == kinds[1]
    if packed:  # as for rows of no sequence, which no kernel writes
        for out, *more in outs:
            assert not out.any() and all((x == -math.inf).all() for x in more)
    assert len(execute.repeats) == 1
    if splits > 1:  # parts and their merge; the workspace is anywhere
        assert len(launches) == 4 and launches[3].kernel == launches[1].kernel
        return
    assert len(launches) == 2
    pairs = zip((*first, *outs[0]), (*second, *outs[1]), strict=True)
    moved = {a.data_ptr(): b.data_ptr() for a, b in pairs}
    expected = with_other_addresses(launches[0].params, moved)
    assert with_other_addresses(launches[1].params, {}) == expected != []
    assert expected != with_other_addresses(launches[0].params, {})
    assert launches[1].stream == 77 and launches[0].grid == launches[1].grid


@pytest.mark.parametrize(
    "changed",
    [
        lambda q, k, v: ((q[:, :150], k, v), {}),
        lambda q, k, v: ((q, k.transpose(0, 1).contiguous().transpose(0, 1), v), {}),
        lambda q, k, v: ((q, k, v), {"softmax_scale": 0.5}),
        lambda q, k, v: ((q, k, v), {"return_lse": True}),
        lambda q, k, v: ((q, k, v), {"out": torch.empty_like(q)}),
    ],
    ids=["shape", "strides", "scale", "lse", "out"],
)
def test_a_call_that_differs_is_not_repeated(fa4, on_gpu, changed):
    """From one that was made once, and from one that is known at one look."""
    execute, launches = on_gpu
    qkv = tensors(0)
    others, options = changed(*qkv)
    for _ in range(2):
        fa4.flash_attn_func(*qkv, causal=True)
    fa4.flash_attn_func(*others, causal=True, **options)
    assert len(execute.repeats) == 2 and len(launches) == 3


def test_a_call_like_the_last_one_needs_no_key(fa4, on_gpu, monkeypatch):
    """Also with tensors that are given twice, and after a call of another shape."""
    execute, launches = on_gpu
    request = importlib.import_module(f"{fa4.__name__}.request")
    starts = torch.tensor([0, 200], dtype=torch.int32)

    def call(seed: int, tokens: int = 200):
        q, k, v = (t[0, :tokens] for t in tensors(seed))
        fa4.flash_attn_varlen_func(q, k, v, starts, starts, 200, 200, causal=True)

    for tokens in (200, 200, 150, 200, 150):
        call(0, tokens)
    monkeypatch.setattr(request, "key_of", None)
    call(1, 150)
    with pytest.raises(TypeError, match="not callable"):
        call(1, 200)
    assert len(execute.repeats) == 2 and len(launches) == 6 and len(execute.repeats.last) == 1


@pytest.mark.parametrize("grad", [False, True])
def test_what_one_look_tells(fa4, grad):
    """Type, dtype, shape, strides, dispatch keys, requires_grad, and that nobody records."""
    likeness = fa4.flash_attn4_cute.likeness.Likeness
    a, b, starts = torch.zeros(4, 6), torch.zeros(4, 6), torch.zeros(3, dtype=torch.int32)
    with torch.set_grad_enabled(grad):
        known = likeness.of((a, None, b, starts, starts))
        others = [
            (a[:3], None, b, starts, starts),
            (a, None, b.T.contiguous().T, starts, starts),
            (a.double(), None, b, starts, starts),
            (torch._neg_view(a), None, b, starts, starts),
            (torch.nn.Parameter(a), None, b, starts, starts),
            (a.clone().requires_grad_(), None, b, starts, starts),
            (a, None, b, starts, starts[:2]),
        ]
        assert known.holds((b, None, a, starts, starts.clone()))
        assert known.holds((a, None, b, starts.clone(), starts))
        assert not any(known.holds(other) for other in others)
        recorded = likeness.of((a.clone().requires_grad_(),))
        assert recorded.holds((a.clone().requires_grad_(),)) is not grad
        assert not recorded.holds((a,))


def cache_step(seed: int, paged: bool, rotary: bool):
    """Tensors of a step that appends, by name."""
    torch.manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, dtype=torch.bfloat16)

    shape = (12, 16, 1, 64) if paged else (2, 96, 1, 64)
    found = {"q": normal(2, 1, 2, 64), "k_cache": normal(*shape), "v_cache": normal(*shape)}
    found |= {"k": normal(2, 1, 1, 64), "v": normal(2, 1, 1, 64)}
    found["cache_seqlens"] = torch.full((2,), 40, dtype=torch.int32)
    if paged:
        found["block_table"] = torch.arange(12, dtype=torch.int32).view(2, 6)
    if rotary:
        found |= {"rotary_cos": normal(96, 8), "rotary_sin": normal(96, 8)}
    return found


@pytest.mark.parametrize(("paged", "rotary"), [(False, False), (True, True)])
def test_a_repeated_step_appends_before_it_attends(fa4, on_gpu, paged, rotary):
    """Three kernels, the second of which reads what the first wrote where nobody else looks."""
    execute, launches = on_gpu
    steps = [cache_step(seed, paged, rotary) for seed in range(3)]
    options = {"causal": True, "num_splits": 2, "return_lse": True}
    answers = [fa4.flash_attn_with_kvcache(**step, **options) for step in steps]
    assert len(execute.repeats) == 1 and len(launches) == 9
    for number in (1, 2):
        moved: dict[int, int] = {}
        for before, after in zip(launches[:3], launches[3 * number :][:3], strict=True):
            assert (before.kernel, before.grid, before.stream) == (
                after.kernel, after.grid, after.stream,
            )  # fmt: skip
            pairs = zip(
                with_other_addresses(before.params, {}),
                with_other_addresses(after.params, {}),
                strict=True,
            )
            for old, new in (pair for words in pairs for pair in zip(*words, strict=True)):
                assert moved.setdefault(old, new) == new, "one address became two"
        changed = {old: new for old, new in moved.items() if old != new}
        assert len(set(changed.values())) == len(changed), "two addresses became one"
        for name, tensor in steps[0].items():
            assert moved[tensor.data_ptr()] == steps[number][name].data_ptr(), name
        for first, later in zip(answers[0], answers[number], strict=True):
            assert moved[first.data_ptr()] == later.data_ptr()
        # Beside what a caller sees: lengths, rotated queries, and the parts with their LSEs.
        assert len(changed) == len(steps[0]) + 2 + 3 + rotary


def test_new_keys_at_odd_addresses_are_another_call(fa4, on_gpu):
    """Of the same shape and strides, after a call that moved 16 bytes at a time, and before one."""
    execute, launches = on_gpu
    step = cache_step(0, paged=False, rotary=False)
    options = {"causal": True, "num_splits": 2, "return_lse": True}
    odd = torch.zeros(step["k"].numel() + 1, dtype=torch.bfloat16)[1:].view(step["k"].shape)
    for k in (step["k"], odd, step["k"], odd):
        fa4.flash_attn_with_kvcache(**step | {"k": k}, **options)
    appends = [launch.kernel for launch in launches[::3]]
    assert appends[0] == appends[2] != appends[1] == appends[3] and len(execute.repeats) == 1


@pytest.mark.parametrize("stacked", [False, True], ids=["pair", "stack"])
def test_a_repeated_merge_passes_other_addresses_and_nothing_else(fa4, on_gpu, stacked):
    """Also of two tensors, whose distance differs from call to call."""
    _, launches = on_gpu
    room = torch.zeros(9, 2, 200, 2, 64, dtype=torch.bfloat16)
    lses = torch.zeros(9, 2, 2, 200)
    found = []
    for first, second in ((0, 1), (2, 8), (7, 3)):
        if stacked:
            parts = (room[first : first + 2], lses[first : first + 2].mT)
            answer = fa4.flash_attn_combine(*parts, out_dtype=torch.float32)
        else:
            parts = (room[first], lses[first], room[second], lses[second])
            answer = fa4.merge_attention_states(*parts)
        found.append([t.data_ptr() for t in (*parts, *answer)])
    known = importlib.import_module(f"{fa4.__name__}.flash_attn4_cute.repeat_merge").known
    assert len(launches) == 3 and len(known) == 2, "by its key and by its kind"
    for launch, addresses in zip(launches[1:], found[1:], strict=True):
        moved = dict(zip(found[0], addresses, strict=True))
        expected = with_other_addresses(launches[0].params, moved)
        assert with_other_addresses(launch.params, {}) == expected
        assert (launch.grid, launch.stream) == (launches[0].grid, 77)
    misaligned = torch.zeros(2 * 200 * 2 * 64 + 1, dtype=torch.bfloat16)[1:].view(2, 200, 2, 64)
    fa4.merge_attention_states(misaligned, lses[0], room[0], lses[0])
    assert launches[3].kernel != launches[0].kernel, "16 bytes at a time, at any address"


def test_growing_maxima_are_one_call(fa4, on_gpu):
    """A serving engine without graphs passes another max_seqlen_k at each step."""
    execute, launches = on_gpu
    step = cache_step(0, paged=True, rotary=False)
    starts, known = torch.arange(3, dtype=torch.int32), []
    for longest in (70, 71, 96, 64):  # planned as 128 keys, the last one as 64
        fa4._flash_attn_fwd(
            step["q"][:, 0], step["k_cache"], step["v_cache"], cu_seqlens_q=starts,
            seqused_k=step["cache_seqlens"], page_table=step["block_table"], max_seqlen_q=1,
            max_seqlen_k=longest, causal=True, num_splits=2,
        )  # fmt: skip
        known.append(len(execute.repeats))
    assert known == [1, 1, 1, 2] and len(launches) == 8


def test_operators_repeat_calls_and_pass_the_lse(fa4, on_gpu):
    """torch.compile hands out= and lse to an operator, which no option says is wanted."""
    execute, launches = on_gpu
    q, k, v = tensors(0)
    problem = fa4.flash_attn4_cute.problem
    call = fa4.ops.flatten(problem.AttentionTensors(q=q, k=k, v=v), problem.AttentionOptions())
    out, lse = torch.empty_like(q), torch.empty(2, 2, 200)
    for _ in range(2):
        fa4.ops.forward_out(out, lse, *call)
        fa4.ops.forward_out(out, None, *call)
    assert len(execute.repeats) == 2 and len(launches) == 4
    address = lse.data_ptr().to_bytes(8, "little")
    with_lse = [any(p.startswith(address) for p in launch.params) for launch in launches]
    assert with_lse == [True, False, True, False]


def test_negative_views_are_read_with_their_sign(fa4, on_gpu):
    """By a call that is new, and by those of known shapes, the last ones and others."""
    (_, launches), qkv = on_gpu, tensors(0)
    for n, place in [(n, place) for n in (200, 200, 64, 200) for place in range(3)]:
        fa4.flash_attn_func(*(torch._neg_view(t) if t is qkv[place] else t for t in qkv))
        passed = sum(with_other_addresses(launches[-1].params, {}), [])
        assert [t.data_ptr() in passed for t in qkv] == [i != place for i in range(3)]
        fa4.flash_attn_func(*(t[:, :n] for t in qkv))


def test_lengths_of_any_type_are_one_call(fa4, on_gpu):
    """FA#2143, #2507: a plain integer, NumPy's and a 0-d tensor."""
    execute, launches = on_gpu
    q, k, v = (t[0] for t in tensors(0))
    cu = torch.tensor([0, 200], dtype=torch.int32)
    for longest in (200, np.int64(200), torch.tensor(200), np.int32(200)):
        fa4.flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=True)
    assert len(execute.repeats) == 1 and len(launches) == 4


@pytest.fixture
def counters(fa4, on_gpu, monkeypatch):
    """What is cleared before the launches on a card of 3 SMs whose CTAs take tiles from a counter:
    (the address, whether it was cleared in time) of each launch."""
    execute, launches = on_gpu
    package = f"{fa4.__name__}.flash_attn4_cute"
    plan, device = (importlib.import_module(f"{package}.{name}") for name in ("plan", "device"))
    monkeypatch.setattr(plan, "supported_card", lambda d: device.Card("a card", (10, 0), 3))
    found, cleared, fill = [], set(), Recorder.fill

    def clear(self, address: int, number: int, word: int, stream: int) -> None:
        fill(self, address, number, word, stream)
        if number == 1:
            cleared.add(address)

    def launch(launched: Launch) -> None:
        words = {w for words in with_other_addresses(launched.params, {}) for w in words}
        found.append(cleared & words)
        for address in found[-1]:
            cell = ctypes.c_int32.from_address(address)
            assert cell.value == 0
            cell.value = 5  # tiles that were taken
        launches.append(launched)

    monkeypatch.setattr(Recorder, "fill", clear)
    monkeypatch.setattr(bootstrap(), "on_launch", launch)
    return found


@pytest.mark.parametrize(("tokens", "splits", "counts"), [(800, 1, 1), (300, 3, 1), (300, 1, 0)])
def test_tiles_are_counted_from_zero_at_each_call(fa4, counters, tokens, splits, counts):
    """In memory that the call has for itself, also behind the workspace of split keys; not where
    each tile has a CTA."""
    for seed in range(3):
        torch.manual_seed(seed)
        q, k, v = (torch.randn(tokens, 1, 64, dtype=torch.bfloat16) for _ in range(3))
        starts = torch.tensor([0, tokens], dtype=torch.int32)
        fa4.flash_attn_varlen_func(
            q, k, v, starts, starts, tokens, tokens, causal=True, num_splits=splits
        )
    repeated = counters[2 if splits > 1 else 1 :: 2 if splits > 1 else 1]
    assert [len(addresses) for addresses in repeated] == [counts] * 2


def test_threads_do_not_mix_their_addresses(fa4, on_gpu):
    _, launches = on_gpu
    mine = [tensors(seed) for seed in range(4)]
    fa4.flash_attn_func(*mine[0], causal=True)
    launches.clear()
    together = threading.Barrier(len(mine))

    def work(qkv):
        together.wait()
        for _ in range(40):
            fa4.flash_attn_func(*qkv, causal=True)

    threads = [threading.Thread(target=work, args=(qkv,)) for qkv in mine]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(launches) == 160
    known = [[t.data_ptr() for t in qkv] for qkv in mine]
    for launch in launches:
        addresses = [int.from_bytes(p[:8], "little") for p in launch.params[:3]]
        assert addresses in known
