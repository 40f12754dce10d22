"""Whether a result lies where an operand does: kernels write the one while they read the other."""

from __future__ import annotations

from torch import Tensor

from .checks import refuse
from .problem import AttentionTensors


def check_apart(tensors: AttentionTensors, names: tuple[str, str] = ("k", "v")) -> None:
    """Given results share no memory with q, k and v, nor with each other.

    The caller knows k and v by `names`.

    Raises:
        ValueError: naming both; or a result is expanded, so that its elements share memory.
    """
    out, lse = tensors.out, tensors.lse
    operands = [("q", tensors.q), (names[0], tensors.k), (names[1], tensors.v)]
    for name, result in (("out", out), ("lse", lse)):
        if result is None:
            continue
        check_not_expanded(name, result)
        for other, operand in operands:
            if overlap(result, operand):
                raise refuse(
                    ValueError,
                    name,
                    f"memory of {other}",
                    f"is written while {other} is still in use, which makes garbage of both",
                    "Pass another tensor, or None to allocate one",
                )
        operands.append((name, result))


def check_not_expanded(name: str, result: Tensor) -> None:
    """No two elements of a given `result` are one in memory because their stride is 0."""
    if any(step == 0 and n > 1 for n, step in zip(result.shape, result.stride(), strict=True)):
        raise refuse(
            ValueError,
            f"{name}.stride",
            result.stride(),
            "elements that share memory cannot all be written",
            "Pass a tensor that is not expanded, or None to allocate one",
        )


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors share memory.

    What only looks so is told apart where rows of both alternate in one buffer, as those of slices
    of its columns do; anything more entangled counts as shared.
    """
    if a.numel() == 0 or b.numel() == 0 or a.device.type == "meta":
        return False
    begins = a.data_ptr(), b.data_ptr()
    if a.is_contiguous() and b.is_contiguous():  # as most are, and told apart in a tenth the time
        return begins[0] < begins[1] + b.nbytes and begins[1] < begins[0] + a.nbytes
    first, second = _extents(a), _extents(b)
    length_a, length_b = (sum(n * step for n, step in x) for x in (first, second))
    if begins[0] + length_a + a.element_size() <= begins[1]:
        return False
    if begins[1] + length_b + b.element_size() <= begins[0]:
        return False
    for pitch in {step for _, step in (*first, *second)}:
        width_a, width_b = (
            _width(x, pitch, t.element_size()) for x, t in ((first, a), (second, b))
        )
        ahead = (begins[1] - begins[0]) % pitch
        if width_a <= ahead and ahead + width_b <= pitch:
            return False
    return True


def span(t: Tensor) -> int:
    """Bytes from the beginning of a tensor to its end."""
    if t.numel() == 0:
        return 0
    return sum(n * step for n, step in _extents(t)) + t.element_size()


def _extents(t: Tensor) -> list[tuple[int, int]]:
    """(size - 1, stride in bytes) of the dimensions that lead to other addresses."""
    size = t.element_size()
    return [(n - 1, s * size) for n, s in zip(t.shape, t.stride(), strict=True) if n > 1 and s]


def _width(extents: list[tuple[int, int]], pitch: int, itemsize: int) -> int:
    """Bytes that a row takes where rows begin at multiples of `pitch`; more than it if none do."""
    if any(step % pitch for _, step in extents if step >= pitch):
        return pitch + 1
    return sum(n * step for n, step in extents if step < pitch) + itemsize
