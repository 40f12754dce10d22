"""Runs compiled CuTe DSL kernels on the CPU, by executing their PTX; see README.md.

import ptx_emulator
ptx_emulator.bootstrap()                       # before cutlass is imported
compiled = cute.compile(..., options="--enable-tvm-ffi --gpu-arch sm_120a")
with ptx_emulator.session(arch="sm_120a", schedule=3) as emulator:
    emulator.call(compiled, q, k, v, out)      # CPU tensors
"""

from .findings import EmulationError, Finding
from .launch.host import bootstrap
from .session import Session, session

__all__ = ["EmulationError", "Finding", "Session", "bootstrap", "session"]
