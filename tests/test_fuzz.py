"""The fuzzer finds what is wrong, shrinks it, and says the same for the same seed."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from .append_cases import Append
from .cases import Case
from .fuzz.backends import Direct
from .fuzz.generate import Kernel, Limits, draw_pool
from .fuzz.search import Search
from .oracle import Rule

POOL = (Kernel(), Kernel(has_right=True), Kernel(layout="varlen"))
NAMES = {"torch": torch, "Case": Case, "Append": Append, "Rule": Rule}


def search(package, pool, tmp_path, cases, seed=3):
    limits = Limits(pairs=20_000, length=150, rows=6)
    backend = Direct(package, torch.device("cpu"), limits)
    backend.num_kernels = lambda: 0
    return Search(backend, pool, tmp_path / "case.txt").run(cases, seed, 600)


def spoilt(fa4, spoil):
    """fa4, with its dense function's results passed through `spoil`."""

    def flash_attn_func(q, k, v, **options):
        result = fa4.flash_attn_func(q, k, v, **options)
        spoil(q, result[0] if isinstance(result, tuple) else result)
        return result

    return SimpleNamespace(
        flash_attn_func=flash_attn_func, flash_attn_varlen_func=fa4.flash_attn_varlen_func
    )


def test_a_wrong_row_is_found_and_shrunk(fa4, tmp_path):
    """One element, wrong only in calls of 20 queries or more."""

    def spoil(q, out):
        if q.shape[0] and q.shape[1] >= 20:
            out[-1, 19, -1, -1] += 0.5

    found = search(spoilt(fa4, spoil), POOL, tmp_path, 60)
    assert found.findings and found.passed
    case = eval(found.findings[0]["case"], NAMES)
    assert case.layout == "dense" and case.batch == 1 and case.heads == 1
    assert case.seqlens_q == (20,) and case.fill == "normal" and case.window is not None
    assert case.seqlens_k[0] <= 1


def test_an_input_that_changes_is_found(fa4, tmp_path):
    found = search(spoilt(fa4, lambda q, out: q.mul_(2)), POOL[:1], tmp_path, 30)
    assert found.findings and "same_bits" in found.findings[0]["error"]


def test_refusals_are_no_passes(fa4, tmp_path):
    """They are counted by the argument that they name."""

    def refuse(*args, **options):
        raise NotImplementedError("softcap=1.0: not here. Leave it.")

    package = SimpleNamespace(flash_attn_func=refuse, flash_attn_varlen_func=refuse)
    found = search(package, POOL, tmp_path, 20)
    assert found.passed == 0 and found.refused == {"softcap": 20} and not found.findings


def test_the_same_seed_draws_the_same_kernels_and_cases(fa4, tmp_path, monkeypatch):
    from .fuzz import search as module

    assert draw_pool(5, 20) == draw_pool(5, 20) != draw_pool(6, 20)
    drawn = []
    monkeypatch.setattr(module, "verify", lambda package, value, *_: drawn.append(value))
    for _ in range(2):
        search(fa4, draw_pool(5, 20), tmp_path, 150)
    first, second = drawn[:150], drawn[150:]
    assert first == second and len(set(map(repr, first))) > 100


def test_the_pool_covers_the_argument_space():
    """Every field of a kernel takes another value than its default somewhere."""
    pool = draw_pool(0, 400)
    for name in Kernel.__dataclass_fields__:
        assert len({getattr(kernel, name) for kernel in pool}) > 1, name


@pytest.mark.parametrize("value", [Case(name="x"), replace(Case(name="y"), used_k=(3,))])
def test_a_case_can_be_replayed_from_its_text(value):
    assert eval(repr(value), NAMES) == value
