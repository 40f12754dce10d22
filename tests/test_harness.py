"""The families of cases bite: kernels with a known bug each are caught by the family for it."""

import math
from types import SimpleNamespace

import pytest
import torch

from . import cases, harness

CPU = torch.device("cpu")


def without(name: str, value):
    """A kernel that ignores an argument."""

    def change(options: dict) -> dict:
        return options | ({name: value} if name in options else {})

    return change


def one_token_too_many(options: dict) -> dict:
    return options | {"seqused_k": options["seqused_k"] + 1} if "seqused_k" in options else options


def identity_table(options: dict) -> dict:
    if "block_table" not in options:
        return options
    table = options["block_table"]
    return options | {"block_table": torch.arange(table.numel()).view_as(table).to(table) % 4}


def window_off_by_one(options: dict) -> dict:
    left, right = options.get("window_size") or (None, None)
    if left is None or left < 1:
        return options
    return options | {"window_size": (left - 1, right)}


BUGS = {
    "ignores causal": ("unequal_causal", without("causal", False)),
    "ignores the window": ("windows", without("window_size", (-1, -1))),
    "window off by one": ("windows", window_off_by_one),
    "ignores softcap": ("features", without("softcap", 0.0)),
    "ignores the sink": ("features", without("s_aux", None)),
    "ignores alibi": ("features", without("alibi_slopes", None)),
    "ignores the scale": ("features", without("softmax_scale", None)),
    "reads one token too many": ("used", one_token_too_many),
    "ignores seqused_k": ("used", without("seqused_k", None)),
    "ignores seqused_q": ("used", without("seqused_q", None)),
    "reads pages in order": ("pages", identity_table),
}


def broken(fa4, change_options=None, change_result=None) -> SimpleNamespace:
    """The kernel with a bug around it."""

    def wrap(function):
        def call(*args, **options):
            result = function(*args, **(change_options or dict)(options))
            return change_result(result) if change_result else result

        return call

    names = ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache")
    return SimpleNamespace(**{name: wrap(getattr(fa4, name)) for name in names})


def fails(kernel, case: cases.Case) -> bool:
    """Whether the kernel fails a case, by a wrong answer or by refusing."""
    try:
        harness.verify(kernel, case, CPU)
    except (AssertionError, ValueError):
        return True
    return False


@pytest.mark.parametrize("bug", BUGS)
def test_a_kernel_that(fa4, bug):
    family, change = BUGS[bug]
    kernel = broken(fa4, change)
    assert any(fails(kernel, case) for case in cases.FAMILIES[family])


def lse_in_base_two(result):
    out, lse = result
    return out, lse * math.log2(math.e)


def last_row_missing(result):
    out, lse = result
    if out.shape[-3]:
        out[..., -1, :, :] = 0
    return out, lse


def heads_swapped(result):
    out, lse = result
    return out.flip(-2), lse


def a_little_too_small(result):
    out, lse = result
    return out * 0.99, lse


@pytest.mark.parametrize(
    "spoil", [lse_in_base_two, last_row_missing, heads_swapped, a_little_too_small]
)
def test_an_answer_with(fa4, spoil):
    """Every case fails, and passes without the bug."""
    for case in (c for c in cases.CORE if c.d == 64):
        assert fails(broken(fa4, change_result=spoil), case)
        assert not fails(broken(fa4), case)
