"""A graph of torch.compile calls the score_mod and mask_mod it is called with, and no other."""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

LENGTH = 24


def qkv():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, LENGTH, 2, 8, generator=generator) for _ in range(3)]


def within(window, q_idx, kv_idx):
    return (kv_idx <= q_idx) & (q_idx - kv_idx < window)


def closure(window):
    return lambda b, h, i, j, info, aux: within(window, i, j)


def with_default(window):
    return lambda b, h, i, j, info, aux, window=window: within(window, i, j)


def with_keyword(window):
    # Names that parameters of ours had once.
    return lambda b, h, i, j, info, aux, *, make=window, told_by=None: within(make, i, j)


def over_tensor(window):
    return closure(torch.tensor(window))


def windowed(window, b, h, i, j, info, aux):
    return within(window, i, j)


def partial(window):
    return functools.partial(windowed, window)


class Windowed:
    """Equal to all others, as a caller's class may say."""

    def __init__(self, window):
        self.window = window

    def __call__(self, b, h, i, j, info, aux):
        return within(self.window, i, j)

    def method(self, *args):
        return self(*args)

    def __eq__(self, other):
        return True

    def __hash__(self):
        return 1


def method(window):
    return Windowed(window).method


KINDS = [
    closure,
    with_default,
    with_keyword,
    over_tensor,
    partial,
    Windowed,
    method,
]


@pytest.fixture
def graphs():
    """The number of graphs is its frame_count."""
    torch._dynamo.reset()
    yield CompileCounterWithBackend("eager")
    torch._dynamo.reset()


def check(function, graph, *calls):
    """`graph`, which is `function` compiled, says of each of the calls what `function` says."""
    for given in calls:
        expected, found = function(*qkv(), given), graph(*qkv(), given)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_graphs_tell_functions_apart(fa4, graphs, make):
    """Functions of one code that captured different values, kept and not, are different ones."""

    def masked(q, k, v, mask_mod):
        return fa4.flash_attn_func(q, k, v, mask_mod=mask_mod)

    graph = torch.compile(masked, backend=graphs, fullgraph=True)
    kept = make(3)
    check(masked, graph, kept, make(7), kept)


@pytest.mark.parametrize("make", [Windowed, partial, int], ids=lambda make: make.__name__)
def test_functions_made_in_the_graph(fa4, graphs, make):
    """They are told apart by what they captured, numbers that would be dynamic among it."""

    def masked(q, k, v, inner):
        def mask_mod(*args):
            return within(inner, *args[2:4]) if isinstance(inner, int) else inner(*args)

        return fa4.flash_attn_func(q, k, v, mask_mod=mask_mod)

    graph = torch.compile(masked, backend=graphs, fullgraph=True)
    kept = make(3)
    check(masked, graph, kept, make(7), kept)


def test_equal_functions_share_a_graph(fa4, graphs):
    """One graph for each value, however many closures and partial functions there are."""

    class Layer(torch.nn.Module):
        def __init__(self, window):
            super().__init__()
            self.mask_mod = closure(window)

        def forward(self, q, k, v, score_mod):
            return fa4.flash_attn_func(q, k, v, mask_mod=self.mask_mod, score_mod=score_mod)

    for window in (3, 7, 3, 7, 3, 7, 3, 7, 3, 7, 3, 7):
        layer = Layer(window)
        graph = torch.compile(layer, backend=graphs, fullgraph=True)
        check(layer, graph, functools.partial(shifted, 0.5))
    assert graphs.frame_count == 2


def shifted(slope, score, b, h, i, j, info, aux):
    return score + slope * (i - j)


def test_what_changes_is_seen(fa4, graphs):
    """An object's state, a global, and a variable of a closure that is assigned anew."""
    owner, now = Windowed(3), 3

    def reads_variable(b, h, i, j, info, aux):
        return within(now, i, j)

    def masked(q, k, v, mask_mod):
        return fa4.flash_attn_func(q, k, v, mask_mod=mask_mod)

    graph = torch.compile(masked, backend=graphs, fullgraph=True)
    for window in (3, 7):
        owner.window = now = SETTING["window"] = window
        check(masked, graph, owner, owner.method, reads_variable, reads_global)


SETTING = {"window": 3}


def reads_global(b, h, i, j, info, aux):
    return within(SETTING["window"], i, j)


def test_graphs_hold_their_functions(fa4, graphs):
    """A gradient may be asked for when the caller has let go of the function; nothing stays."""

    def masked(q, k, v, mask_mod):
        return fa4.flash_attn_func(q, k, v, mask_mod=mask_mod)

    gradients = []
    for function in (masked, torch.compile(masked, backend="aot_eager", fullgraph=True)):
        q, k, v = qkv()
        mask_mod = over_tensor(3)
        died = weakref.ref(mask_mod)
        out = function(q.requires_grad_(), k, v, mask_mod)
        del mask_mod
        gc.collect()
        out.sum().backward()
        gradients.append(q.grad)
    assert torch.equal(*gradients)
    assert died() is not None
    torch._dynamo.reset()
    del function, out
    gc.collect()
    assert died() is None


def test_what_cannot_be_compiled_is_said(fa4, graphs):
    """A function that captures a tensor of the graph; without fullgraph it breaks the graph."""

    def masked(q, k, v, mask_mod):
        window = q.new_full((), 3)
        return fa4.flash_attn_func(q, k, v, mask_mod=lambda *args: mask_mod(*args) & (window > 0))

    with pytest.raises(torch._dynamo.exc.Unsupported, match="mask_mod=Tensor.*aux_tensors"):
        torch.compile(masked, backend=graphs, fullgraph=True)(*qkv(), closure(3))
    check(masked, torch.compile(masked, backend=graphs), closure(3))


def test_numbers_of_functions(fa4):
    """They name one object while it lives, and nothing after that or in another process."""
    functions = fa4.ops.functions
    one, two = Windowed(3), Windowed(3)
    assert functions.function_of(functions.handle(one)) is one
    assert functions.handle(one) == functions.handle(one) != functions.handle(two)
    assert functions.handle(None) == 0 and functions.function_of(0) is None
    number = functions.handle(one)
    del one
    with pytest.raises(ValueError, match=f"{number} of a traced graph: is no longer alive"):
        functions.function_of(number)
    later = Windowed(3)  # where the first one was, as likely as not
    assert functions.handle(later) > number

    class Slotted:
        __slots__ = ()

        def __call__(self, *args): ...

    with pytest.raises(TypeError, match="__weakref__"):
        functions.handle(Slotted())
