"""Adapter: upstream flash-attn-4, which the tests install and run unmodified."""

import importlib
import importlib.util
from typing import Any

from torch import Tensor

from ..findings import EmulationError
from ..session import Session
from .case import Case, Inputs, cut_into_pages


def forward(emulator: Session, case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(out, lse) of upstream's forward kernel for the session's card.

    Raises:
        ImportError: upstream, or this repository's tests, which know how to call it, are missing.
        NotImplementedError: upstream does not have the card or the feature.
    """
    if importlib.util.find_spec("flash_attn") is None:
        raise ImportError("--kernel upstream needs the package flash-attn-4: pip install it first")
    try:
        upstream = importlib.import_module("tests.emulator.upstream")
    except ModuleNotFoundError as error:
        raise ImportError("--kernel upstream runs in the repository's root only") from error
    if emulator.card.arch not in upstream.ARCH:
        known = ", ".join(upstream.ARCH)
        raise NotImplementedError(
            f"--arch {emulator.card.arch} with --kernel upstream: use {known}"
        )
    keys, options = arguments(case, inputs)
    with upstream.upstream_on(emulator) as module:
        try:
            return upstream.forward(module, inputs.q, *keys, **options)
        except (AssertionError, NotImplementedError, ValueError) as error:
            if isinstance(error, EmulationError):
                raise
            raise NotImplementedError(
                f"upstream refuses: {error or type(error).__name__}"
            ) from error


def arguments(case: Case, inputs: Inputs) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    """k and v as upstream takes them, and the keyword arguments of its forward."""
    options: dict[str, Any] = {}
    if (case.left, case.right) == (None, 0):
        options["causal"] = True
    elif (case.left, case.right) != (None, None):
        options |= {"window_size_left": case.left, "window_size_right": case.right}
    if case.softcap:
        options["softcap"] = case.softcap
    if inputs.sink is not None:
        options["learnable_sink"] = inputs.sink
    if case.num_splits > 1:
        options["num_splits"] = case.num_splits
    keys = inputs.k, inputs.v
    if case.varlen:
        options |= {"cu_seqlens_q": inputs.cu_q, "cu_seqlens_k": inputs.cu_k}
        options |= {"max_seqlen_q": case.seqlen_q, "max_seqlen_k": case.seqlen_k}
    if case.page_size is not None:
        # what lies behind the last key counts with weight 0 there: it must be finite
        *pages, options["page_table"], options["seqused_k"] = cut_into_pages(case, inputs, 0.0)
        keys = pages[0], pages[1]
        options.pop("cu_seqlens_k", None)
    return keys, options
