"""Whether one call is answered rightly, in every respect that can be told from outside."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import append_cases, harness
from ..append_cases import Append
from ..cases import Case
from ..harness import Call
from . import merges
from .merges import Merge


def verify(
    package: ModuleType, value: Case | Append | Merge, device: torch.device, twice: bool
) -> None:
    """Call, and compare with the oracle.

    Raises:
        NotImplementedError: the call is refused; nothing was written then.
        AssertionError: a wrong result, an input that changed, or a second run that differs.
    """
    if isinstance(value, Merge):
        merges.verify(package, value, device)
        return
    if isinstance(value, Append):
        append_cases.verify(package, value, device)
        return
    call = harness.build(value, device)
    kept = [x.clone() for x in tensors_of(call)]
    out, lse = harness.run_uncut(package, call)
    for x, before in zip(tensors_of(call), kept, strict=True):
        append_cases.same_bits(x, before)
    harness.judge(call, harness.cut(call, out, lse))
    check_rest(call, out, lse)
    if twice:
        given = torch.full_like(out, torch.nan)
        again, _ = harness.run_uncut(package, call, out=given)
        assert again.data_ptr() == given.data_ptr(), "out= was not what came back"
        rows = harness.cut(call, out, None), harness.cut(call, given, None)
        assert harness.same_bits(*rows), "a second run, with out=, differs"
        for x in rows[1].outs:
            x.fill_(torch.nan)
        assert given.isnan().all(), "rows of out= that belong to no sequence were written"


def tensors_of(call: Call) -> list[Tensor]:
    """What a call must leave as it is."""
    given: list[Any] = [call.q, call.k, call.v, *call.tensors.values()]
    return [x for x in given if isinstance(x, Tensor)]


def check_rest(call: Call, out: Tensor, lse: Tensor | None) -> None:
    """Rows outside every sequence: out = 0, LSE = -inf."""
    out, lse = out.clone(), None if lse is None else lse.clone()
    cut = harness.cut(call, out, lse)
    for rows in cut.outs:
        rows.zero_()
    for rows in cut.lses or ():
        rows.fill_(-torch.inf)
    assert (out == 0).all(), "rows of out that belong to no sequence are not 0"
    assert lse is None or (lse == -torch.inf).all(), "rows of LSE of no sequence are not -inf"
