"""What a process remembers: made once whoever asks, and nothing of a user's kept for ever."""

import dataclasses
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from flash_attn4_cute import compiler, device, packaged, plan
from flash_attn4_cute.launcher.kernel import Kernel
from flash_attn4_cute.launcher.program import Program
from flash_attn4_cute.problem import (
    AttentionOptions,
    AttentionProblem,
    AttentionTensors,
    make_mask_rule,
)
from flash_attn4_cute.remember import MAX_WITH_FUNCTIONS, OncePerKey
from flash_attn4_cute.rules import BandRule

from .cross_compile import keys

THREADS = 8


def kernel() -> Kernel:
    return Kernel(b"machine code", Program((), (), (), (), (), (), ()))


@pytest.fixture
def nothing_known(monkeypatch):
    """No package, no cache on disk, no memory, and CuTe DSL not asked."""
    monkeypatch.setenv("FLASH_ATTN_4_CACHE", "0")
    monkeypatch.setattr(packaged, "load", lambda key: None)
    monkeypatch.setattr(compiler, "load_cutlass", lambda: None)
    compiler.compiled.cache_clear()
    yield
    compiler.compiled.cache_clear()


def asked_by_threads(key, monkeypatch) -> tuple[list[Kernel], int]:
    """What so many threads get that ask at once, and how many kernels were compiled for them."""
    compiled, start = [], threading.Barrier(THREADS)
    others_wait = threading.Event()

    def compile_kernel(key):
        compiled.append(key)
        others_wait.wait(0.3)  # a second one would begin meanwhile, were it not kept from it
        return kernel()

    def ask(_):
        start.wait()
        return compiler.compiled(key)

    monkeypatch.setattr(compiler, "compile_kernel", compile_kernel)
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(ask, range(THREADS))), len(compiled)


@pytest.mark.parametrize("with_function", [False, True], ids=["plain", "mask_mod"])
def test_threads_compile_a_kernel_once(nothing_known, monkeypatch, caplog, with_function):
    key = keys("sm90a")["sm90a_d64_least"]
    if with_function:
        key = dataclasses.replace(key, rule=BandRule(False, False, mask_mod=lambda *place: True))
    found, compiled = asked_by_threads(key, monkeypatch)
    assert compiled == 1 and len(set(map(id, found))) == 1
    assert caplog.text.count("compiling it now") == 1


def test_a_kernel_of_the_package_waits_for_no_compiler(nothing_known, monkeypatch):
    """Keys have turns of their own."""
    rare, common = (keys("sm90a")[f"sm90a_d64_{name}"] for name in ("most", "least"))
    begun, end = threading.Event(), threading.Event()

    def compile_kernel(key):
        begun.set()
        assert end.wait(60)
        return kernel()

    shipped = kernel()
    monkeypatch.setattr(compiler, "compile_kernel", compile_kernel)
    monkeypatch.setattr(
        packaged, "load", lambda key: shipped if key == compiler.with_target(common) else None
    )
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(compiler.compiled, rare)
        assert begun.wait(60)
        quick = pool.submit(compiler.compiled, common)
        try:
            assert quick.result(30) is shipped and not slow.done()
        finally:
            end.set()
        assert slow.result(30) is not shipped


def test_a_failure_is_not_remembered():
    answers = iter([OSError("for once"), kernel()])

    @OncePerKey
    def made(key):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with pytest.raises(OSError, match="for once"):
        made("key")
    assert made("key") is made("key") and made.num_made == 1


def test_no_turn_is_left_behind():
    """Nor by a thread that looked for the kernel just before another had made it."""
    made = OncePerKey(lambda key: kernel())
    first = made("key")
    assert made._made("key") is first and made.num_made == 1
    assert not made._turns


def closure() -> tuple:
    """A mask_mod that refers to a tensor, and a weak reference to that."""
    tensor = torch.zeros(4)
    return (lambda b, h, i, j, info, aux: j < tensor[0]), weakref.ref(tensor)


def test_functions_are_let_go():
    """Of kernels of a user's functions the last are kept; of others, all."""
    made = OncePerKey(lambda key: kernel())
    often, seldom = closure(), closure()
    plain = made(BandRule(False, False))
    first = made(BandRule(False, False, often[0]))
    made(BandRule(False, False, seldom[0]))
    for _ in range(MAX_WITH_FUNCTIONS - 1):
        made(BandRule(False, False, closure()[0]))
        assert made(BandRule(False, False, often[0])) is first
    seldom = seldom[1]
    gc.collect()
    assert seldom() is None and often[1]() is not None
    assert made(BandRule(False, False)) is plain


def test_plans_let_functions_go_too(monkeypatch):
    card = device.Card("a card", (9, 0), 132)
    monkeypatch.setattr(plan, "supported_card", lambda device: card)
    q = torch.empty(1, 128, 4, 64, dtype=torch.bfloat16)

    def planned(mask_mod) -> plan.Plan:
        options = AttentionOptions(mask=make_mask_rule(False, (None, None), mask_mod))
        tensors = AttentionTensors(q=q, k=q, v=q)
        return plan.make_plan(AttentionProblem.from_tensors(tensors, options))

    plan.make_plan.cache_clear()
    function, tensor = closure()
    plain = planned(None)
    assert planned(function) is planned(function)
    del function
    for _ in range(MAX_WITH_FUNCTIONS):
        planned(closure()[0])
    gc.collect()
    assert tensor() is None
    assert planned(None) is plain
    plan.make_plan.cache_clear()
