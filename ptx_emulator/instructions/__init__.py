"""One file for each class of instructions; importing this package registers them all."""

from . import (  # noqa: F401
    atomic,
    bulk_copy,
    convert,
    cp_async,
    float_arith,
    half_arith,
    integer,
    launch_control,
    matrix_load,
    mbarrier,
    memory,
    mma_sync,
    move,
    registers,
    sync,
    tcgen05,
    tcgen05_cp,
    tcgen05_mma,
    warp,
    wgmma,
)
from .registry import handler_of, instruction

__all__ = ["handler_of", "instruction"]
