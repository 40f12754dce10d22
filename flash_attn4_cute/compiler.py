"""KernelKey -> compiled callable -> launch: what all kernels have in common on the host."""

import functools
import os
import threading
from typing import Any, Protocol

from . import disk_cache


class KernelKey(Protocol):
    """Everything that one compiled kernel depends on; hashable.

    Each kernel has a key class of its own. `trace` returns the kernel, and stand-ins for the
    arguments that its launches take; only it imports cutlass.
    """

    @property
    def variant(self) -> str: ...

    def trace(self) -> tuple[Any, tuple]: ...


_lock = threading.Lock()


def gpu_arch(variant: str) -> str:
    """The compiler's name of a variant: sm120a -> sm_120a."""
    return variant.replace("sm", "sm_")


def load_cutlass():
    """Import CuTe DSL, or say how to get it."""
    try:
        import cutlass
    except ImportError as error:
        raise ImportError(
            "flash-attn-4 compiles its GPU kernels with the package nvidia-cutlass-dsl, which is "
            "not installed. Install it with: pip install nvidia-cutlass-dsl apache-tvm-ffi"
        ) from error
    return cutlass


@functools.cache
def compiled(key: KernelKey):
    """The kernel for `key`: of this process, from the disk, or compiled now, in that order.

    Raises:
        ImportError: nvidia-cutlass-dsl is not installed.
        RuntimeError: the kernel has to be compiled and FLASH_ATTN_4_JIT=0 forbids it.
    """
    load_cutlass()
    with _lock:
        found = disk_cache.load(key)
        if found is None:
            _check_jit(key)
            found = compile_kernel(key)
            disk_cache.store(key, found)
        return found


def _check_jit(key: KernelKey) -> None:
    if os.environ.get("FLASH_ATTN_4_JIT", "1") == "0":
        raise RuntimeError(
            f"FLASH_ATTN_4_JIT=0 forbids compiling, and {disk_cache.folder() or 'no cache'} does "
            f"not hold {key}. Run the call once with FLASH_ATTN_4_JIT=1 to fill the cache, or "
            f"unset FLASH_ATTN_4_JIT"
        )


def compile_kernel(key: KernelKey):
    """Compile the kernel for `key`; needs no GPU.

    Returns a callable that takes what `key.trace()` has stand-ins for, launches on PyTorch's
    current stream, and has `__ptx__` and `__cubin__` if CuTe DSL was told to keep them
    (CUTE_DSL_KEEP=ptx,cubin).
    """
    load_cutlass()
    import cutlass.cute as cute

    kernel, arguments = key.trace()
    return cute.compile(
        kernel,
        *arguments,
        cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True),
        options=f"--enable-tvm-ffi --gpu-arch {gpu_arch(key.variant)}",
    )
