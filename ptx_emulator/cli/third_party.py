"""Adapter: upstream flash-attn-4, which the tests install and run unmodified."""

import importlib
import importlib.util
from typing import Any

from torch import Tensor

from ..session import Session
from .case import Case, Inputs


def forward(emulator: Session, case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(out, lse) of upstream's forward kernel for the session's card.

    Raises:
        ImportError: upstream, or this repository's tests, which know how to call it, are missing.
        NotImplementedError: the adapter does not pass this feature on.
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
    unsupported = {
        "--varlen": case.varlen,
        "--sink": case.sink,
        "--page-size": case.page_size is not None,
        "--num-splits": case.num_splits > 1,
    }
    for option, asked in unsupported.items():
        if asked:
            raise NotImplementedError(f"{option} with --kernel upstream is not provided: leave it")
    options: dict[str, Any] = {"softcap": case.softcap} if case.softcap else {}
    if (case.left, case.right) == (None, 0):
        options["causal"] = True
    elif (case.left, case.right) != (None, None):
        options |= {"window_size_left": case.left, "window_size_right": case.right}
    with upstream.upstream_on(emulator) as module:
        return upstream.forward(module, inputs.q, inputs.k, inputs.v, **options)
