"""When a result is right: bounds are multiples of the errors that PyTorch makes on the same inputs.

| check | out - ref measured as | bound |
|---|---|---|
| field | max over elements | 2 (softcap: 3) x NAIVE + 2 x max abs(ref + 0.3 - 0.3 - ref) |
| l2 | Euclidean norm / norm of ref | 1.5 x MIXED + 1 rounding of ref |
| row | worst row's norm / norm of its magnitude | 2 x MIXED + 1 rounding of ref |
| element | worst element / its own magnitude | 3 x MIXED + 1 rounding of ref |
| lse | max over rows | 2 x MIXED (softcap: + 2 float32 epsilons of it) |

ref is the float64 oracle; field is upstream's rule, whose last term is computed in the output
dtype. NAIVE and MIXED are the errors of the oracle's formulas in the inputs' dtype (oracle.py).
Every bound has 8 float32 epsilons of its scale besides (lse: 16): a kernel accumulates in float32
in an order of its own, and PyTorch can be exact by luck (constant inputs). Of a dot product, a
tensor core adds up 16 columns at a time and cuts each sum off, which at d 128 may lose 8 epsilons.
LSE's scale is that of the scores, at most abs(lse) + ln(number of keys): many scores far below zero
may have an LSE near it.

An element's magnitude is the sum of weights * abs(v) behind it: the scale its rounding errors have,
which neither cancellation nor an outlier elsewhere in the tensor hides. Where the magnitude is 0
(no visible key) out must be 0, and where LSE is infinite it must be the same infinity. NaN is never
right. Errors count from 2^-110 on, since a sink may leave every weight below what float32 can hold,
and from half of the dtype's smallest number in each weight on: dropout may leave a row no keys but
those whose weights are a few times that, and a kernel rounds weights before it divides by 1 - p.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import oracle
from .oracle import EXACT, MIXED, NAIVE, Precision, Result, Rule

FIELD_MULTIPLE, FIELD_MULTIPLE_SOFTCAP, FIELD_ROUNDINGS = 2.0, 3.0, 2.0
L2_MULTIPLE, ROW_MULTIPLE, ELEMENT_MULTIPLE = 1.5, 2.0, 3.0
LSE_MULTIPLE = 2.0
ARITHMETIC = 8 * torch.finfo(torch.float32).eps
LSE_ARITHMETIC = 16 * torch.finfo(torch.float32).eps
# softcap * tanh(x) with a tanh that is right to one part in 2^23 of its range, not of its value.
CAP_ARITHMETIC = 2 * torch.finfo(torch.float32).eps

# Below 2^-126 float32 has no normal numbers, and GPUs take weights for 0 there; times any value.
UNDERFLOW = 2.0**-110


@dataclass(frozen=True)
class Reference:
    """For one sequence, the truth and PyTorch's two attempts at it."""

    exact: Result
    naive: Result
    mixed: Result
    softcap: float
    num_keys: int

    @property
    def dtype(self) -> torch.dtype:
        return self.naive.out.dtype

    @property
    def grain(self) -> float:
        """What rounding may change about a weight near 0: half of the dtype's smallest number."""
        info = torch.finfo(self.dtype)
        return info.smallest_normal * info.eps / 2


@dataclass(frozen=True)
class Finding:
    """One measured error beside its bound."""

    name: str
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound  # False for NaN

    def __str__(self) -> str:
        return f"{self.name:8s} {self.error:10.3e} {'<=' if self.ok else '> '} {self.bound:10.3e}"


def reference(q: Tensor, k: Tensor, v: Tensor, rule: Rule, batch: int = 0) -> Reference:
    """q (sq, h, d), k (sk, h_k, d), v (sk, h_k, d_v) of one sequence, in the dtype under test."""

    def at(precision: Precision) -> Result:
        return oracle.attend(q, k, v, rule, batch, precision)

    with torch.no_grad():
        return Reference(at(EXACT), at(NAIVE), at(MIXED), rule.softcap, len(k))


def references(
    qs: Sequence[Tensor], ks: Sequence[Tensor], vs: Sequence[Tensor], rule: Rule
) -> list[Reference]:
    return [reference(q, k, v, rule, b) for b, (q, k, v) in enumerate(zip(qs, ks, vs, strict=True))]


def findings(out: Tensor, ref: Reference) -> list[Finding]:
    """The four checks of out (sq, h, d_v); empty for an empty tensor."""
    exact, size = ref.exact.out, ref.exact.magnitude
    if out.numel() == 0:
        return []
    slip = exact.to(ref.dtype).double() - exact
    error, naive, mixed = (x.double() - exact for x in (out, ref.naive.out, ref.mixed.out))
    floor = UNDERFLOW + ref.grain * ref.exact.reach
    error = error - error.clamp(-floor, floor)
    multiple = FIELD_MULTIPLE_SOFTCAP if ref.softcap else FIELD_MULTIPLE
    trio = (error, mixed, slip)
    return [
        Finding("field", _max(error), field_bound(naive, exact, ref.dtype, multiple)),
        _compare("l2", lambda e: _ratio(e.norm(), exact.norm()), trio, L2_MULTIPLE),
        _compare("row", lambda e: _ratio(e.norm(dim=2), size.norm(dim=2)), trio, ROW_MULTIPLE),
        _compare("element", lambda e: _ratio(e, size), trio, ELEMENT_MULTIPLE),
    ]


def field_bound(naive: Tensor, exact: Tensor, dtype: torch.dtype, multiple: float) -> float:
    """Upstream's bound of the max norm, from PyTorch's error and ref."""
    rounded = exact.to(dtype)
    grain = _max(rounded + 0.3 - 0.3 - rounded)
    return multiple * _max(naive) + FIELD_ROUNDINGS * grain + ARITHMETIC * _max(exact)


def lse_finding(lse: Tensor, ref: Reference) -> Finding:
    """lse (h, sq) float32, natural logarithm."""
    exact, mixed = ref.exact.lse, ref.mixed.lse
    if exact.numel() == 0:
        return Finding("lse", 0.0, 0.0)
    finite = exact.isfinite()
    if not torch.equal(lse.double()[~finite], exact[~finite]):
        return Finding("lse", float("inf"), 0.0)
    size = _max(exact[finite]) + math.log(max(1, ref.num_keys))
    floor = LSE_ARITHMETIC * max(1.0, size) + CAP_ARITHMETIC * ref.softcap
    bound = LSE_MULTIPLE * _max((mixed.double() - exact)[finite]) + floor
    return Finding("lse", _max((lse.double() - exact)[finite]), bound)


def check(
    out: Tensor, lse: Tensor | None, ref: Reference, name: str = "", truncation: float = 0.0
) -> None:
    """Raise AssertionError with the whole table unless one sequence passes every check.

    `truncation` is a relative error of the output that the hardware's additions explain.
    """
    if tuple(out.shape) != tuple(ref.exact.out.shape):
        raise AssertionError(
            f"{name}: out has shape {tuple(out.shape)}, expected {tuple(ref.exact.out.shape)}"
        )
    if out.dtype != ref.dtype:
        raise AssertionError(f"{name}: out is {out.dtype}, expected {ref.dtype}")
    found = [replace(f, bound=f.bound + truncation) for f in findings(out, ref)]
    if lse is not None:
        if lse.dtype != torch.float32 or tuple(lse.shape) != tuple(ref.exact.lse.shape):
            raise AssertionError(
                f"{name}: lse is {lse.dtype} {tuple(lse.shape)}, "
                f"expected torch.float32 {tuple(ref.exact.lse.shape)}"
            )
        found.append(lse_finding(lse, ref))
    if not all(finding.ok for finding in found):
        raise AssertionError("\n".join([name or "result", *map(str, found)]))


def check_gradient(grad: Tensor, exact: Tensor, naive: Tensor, mixed: Tensor, name: str) -> None:
    """The field and l2 rules for a gradient: autograd of the formulas at the three precisions."""
    error, peer, closer = (x.double() - exact for x in (grad, naive, mixed))
    slip = exact.to(grad.dtype).double() - exact
    found = [
        Finding("field", _max(error), field_bound(peer, exact, grad.dtype, FIELD_MULTIPLE)),
        _compare(
            "l2", lambda e: _ratio(e.norm(), exact.norm()), (error, closer, slip), L2_MULTIPLE
        ),
    ]
    if grad.shape != exact.shape or not all(finding.ok for finding in found):
        raise AssertionError("\n".join([name, *map(str, found)]))


def _compare(name: str, measure, errors: tuple[Tensor, Tensor, Tensor], multiple: float) -> Finding:
    """measure(out's error) against multiple * measure(PyTorch's) + measure(rounding of ref)."""
    ours, peer, slip = (_max(measure(e)) for e in errors)
    return Finding(name, ours, multiple * peer + slip + ARITHMETIC)


def _ratio(error: Tensor, size: Tensor) -> Tensor:
    """error / size, where 0 / 0 is right and anything else over 0 is infinitely wrong."""
    return torch.where((size == 0) & (error == 0), 0.0, error.abs() / size)


def _max(x: Tensor) -> float:
    """max abs(x); NaN when any element is, 0 when there is none."""
    return float(x.abs().max()) if x.numel() else 0.0
