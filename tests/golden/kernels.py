"""Whole kernels on small cases, on a card and in the emulator: upstream's for sm_90 and ours.

The inputs come from a frozen generator. A result is the output's 16-bit words and the LSE.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .programs import ARCH, generator


@dataclass(frozen=True)
class Case:
    """One call, of one sequence, or of two that are packed if `varlen`."""

    kernel: str  # "ours" or "upstream"
    dtype: torch.dtype
    seqlens: tuple[int, int]
    heads: tuple[int, int]
    dim: int
    causal: bool
    left: int | None = None
    varlen: bool = False


BF16, FP16 = torch.bfloat16, torch.float16
CASES = {
    f"{kernel} {name}": Case(kernel, *rest)
    for kernel in ("ours", "upstream")
    for name, rest in {
        "d128 causal bf16": (BF16, (90, 330), (2, 1), 128, True),
        "d64 fp16": (FP16, (150, 270), (2, 2), 64, False),
        "d128 window bf16": (BF16, (140, 290), (1, 1), 128, True, 100),
        "d64 varlen bf16": (BF16, (70, 200), (2, 1), 64, True, None, True),
    }.items()
}


def inputs(case: Case, device: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """q, k, v, and what packs two sequences: the second is half as long as the first."""
    draw = generator(90)
    (rows, keys), (heads, kv_heads) = case.seqlens, case.heads

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(draw.standard_normal(shape)).to(case.dtype).to(device)

    def starts(n: int) -> Tensor:
        return torch.tensor([0, n, n + n // 2], dtype=torch.int32, device=device)

    packing = {}
    lead: tuple[int, ...] = (1,)
    if case.varlen:
        packing = {"cu_seqlens_q": starts(rows), "cu_seqlens_k": starts(keys)}
        rows, keys, lead = rows + rows // 2, keys + keys // 2, ()
    tensors = {
        "q": normal(*lead, rows, heads, case.dim),
        "k": normal(*lead, keys, kv_heads, case.dim),
        "v": normal(*lead, keys, kv_heads, case.dim),
    }
    return tensors, packing


def ours(case: Case, launch: Any, device: str) -> tuple[Tensor, Tensor]:
    """(out, lse) of this repository's kernel; `launch` is `flash_attn4_cute.launch.forward`."""
    from flash_attn4_cute.mask_rule import FULL, Band
    from flash_attn4_cute.problem import AttentionOptions, AttentionProblem, AttentionTensors

    given, packing = inputs(case, device)
    tensors = AttentionTensors(**given, **packing)
    mask = Band(case.left, 0) if case.causal else FULL
    longest = case.seqlens if case.varlen else (None, None)
    options = AttentionOptions(
        mask=mask, max_seqlen_q=longest[0], max_seqlen_k=longest[1], return_lse=True
    )
    problem = AttentionProblem.from_tensors(tensors, options)
    tensors.out = given["q"].new_full(problem.out_shape(given["q"]), torch.nan)
    tensors.lse = torch.full(problem.lse_shape(given["q"]), torch.nan, device=device)
    launch(problem, tensors)
    return tensors.out, tensors.lse


def upstream_options(case: Case, packing: dict[str, Tensor]) -> dict[str, Any]:
    """Keyword arguments of upstream's `_flash_attn_fwd`."""
    if case.left is None:
        options: dict[str, Any] = {"causal": case.causal}
    else:
        options = {"window_size_left": case.left, "window_size_right": 0}
    if case.varlen:
        options |= packing
        options |= {"max_seqlen_q": case.seqlens[0], "max_seqlen_k": case.seqlens[1]}
    return options


def result(out: Tensor, lse: Tensor) -> dict[str, np.ndarray]:
    """What is kept."""
    return {
        "out": out.contiguous().view(torch.int16).cpu().numpy().view(np.uint16),
        "lse": lse.contiguous().float().cpu().numpy(),
    }


def on_card(case: Case) -> dict[str, np.ndarray]:
    """Run a case on CUDA device 0."""
    if case.kernel == "ours":
        from flash_attn4_cute.launch import forward

        out, lse = ours(case, forward, "cuda")
    else:
        from flash_attn.cute.interface import _flash_attn_fwd

        given, packing = inputs(case, "cuda")
        options = upstream_options(case, packing)
        out, lse = _flash_attn_fwd(*given.values(), return_lse=True, **options)[:2]
    torch.cuda.synchronize()
    return result(out, lse)


def emulated(case: Case, schedule: int = 0) -> dict[str, np.ndarray]:
    """Run a case in the emulator."""
    import ptx_emulator
    from ptx_emulator.cli.ours import kernels_on

    from ..emulator import upstream

    with ptx_emulator.session(ARCH, schedule=schedule, hardware_sums=True) as emulator:
        if case.kernel == "ours":
            with kernels_on(emulator) as forward:
                return result(*ours(case, forward, "cpu"))
        given, packing = inputs(case, "cpu")
        with upstream.upstream_on(emulator) as module:
            options = upstream_options(case, packing)
            return result(*upstream.forward(module, *given.values(), **options))
