"""KernelKey -> kernel: from the package, from the disk cache, or compiled now."""

import dataclasses
import logging
import threading
from typing import Any, Protocol

import torch

from . import disk_cache, jit, packaged
from .device import TARGETS
from .launcher.kernel import Kernel
from .remember import OncePerKey

logger = logging.getLogger("flash_attn_4")


class KernelKey(Protocol):
    """Everything that one compiled kernel depends on; hashable.

    Each kernel has a key class of its own. `family` names the kernels' architecture family.
    `trace` returns the kernel, and stand-ins for the arguments that its launches take; only it
    imports cutlass.
    """

    @property
    def variant(self) -> str: ...

    @property
    def family(self) -> str: ...

    def trace(self) -> tuple[Any, tuple]: ...


# CuTe DSL traces into one object for the whole process: one kernel at a time.
_compiling = threading.Lock()


def gpu_arch(variant: str) -> str:
    """The compiler's name of a variant or target: sm120a -> sm_120a."""
    return variant.replace("sm", "sm_")


def with_target(key: Any) -> Any:
    """`key` with the target that its machine code is compiled for in place of the variant."""
    return dataclasses.replace(key, variant=TARGETS[key.variant, key.family])


def load_cutlass():
    """Import CuTe DSL, or say how to get it."""
    try:
        import cutlass
    except ImportError as error:
        raise ImportError(
            "flash-attn-4 compiles this GPU kernel, which is not among the precompiled ones, with "
            "the package nvidia-cutlass-dsl, which is not installed. Install it with: "
            "pip install nvidia-cutlass-dsl"
        ) from error
    return cutlass


@OncePerKey
def compiled(key: KernelKey) -> Kernel:
    """The kernel for `key`: of the package, from the disk, or compiled now, in that order.

    Raises:
        ImportError: the kernel has to be compiled and nvidia-cutlass-dsl is not installed.
        RuntimeError: the kernel has to be compiled and FLASH_ATTN_4_JIT=0 forbids it.
    """
    key = with_target(key)
    return packaged.load(key) or disk_cache.load(key) or _compiled_now(key)


def loaded(key: Any, device: torch.device) -> Kernel:
    """`compiled`, with the machine code on `device`: what can fail before a launch has not failed.

    Raises:
        What `compiled` raises; RuntimeError if the driver does not take the machine code.
    """
    kernel = compiled(key)
    if isinstance(kernel, Kernel):  # and not an emulator's
        kernel.load(device.index or 0)
    return kernel


def _compiled_now(key: KernelKey) -> Kernel:
    _check_jit(key)
    load_cutlass()
    # Of processes that start together, one compiles and the others read what it made.
    with disk_cache.only_one(key):
        found = disk_cache.load(key)
        if found is None:
            place = disk_cache.folder() or "this process only"
            logger.warning("no precompiled kernel, compiling it now, to keep in %s: %s", place, key)
            with _compiling:
                found = compile_kernel(key)
            disk_cache.store(key, found)
        return found


def origin(key: KernelKey) -> str:
    """Where the code of `key` comes from in a new process, for people."""
    key, place = with_target(key), disk_cache.folder()
    if packaged.load(key) is not None:
        return f"precompiled for {key.variant}, read from the package at the first call"
    if disk_cache.holds(key):
        return f"disk cache: compiled earlier, read from {place} at the first call of this kernel"
    why = jit.obstacle()
    if why is not None:
        held = f"neither the package nor {place or 'a cache'} holds it"
        return f"none, so that the first call in a process raises an error: {why}, and {held}"
    kept = "for the process" if place is None or disk_cache.holds_function(key) else f"in {place}"
    return f"compiled (JIT) at the first call of this kernel, then kept {kept}"


def _check_jit(key: KernelKey) -> None:
    if jit.is_forbidden():
        raise RuntimeError(
            f"{jit.SWITCH}=0 forbids compiling, and neither the package nor "
            f"{disk_cache.folder() or 'a cache'} holds {key}. Run the call once with "
            f"{jit.SWITCH}=1 to fill the cache, or unset {jit.SWITCH}"
        )


def compile_kernel(key: KernelKey) -> Kernel:
    """Compile the kernel for `key`; needs no GPU.

    The kernel has its PTX as `ptx` if CuTe DSL was told to keep it (CUTE_DSL_KEEP=ptx).
    """
    load_cutlass()
    import cutlass.cute as cute

    from .launcher.translate import translate

    function, arguments = key.trace()
    made = cute.compile(
        function,
        *arguments,
        cute.runtime.make_fake_stream(),
        options=f"--gpu-arch {gpu_arch(key.variant)}",
    )
    kernel = Kernel(*translate(str(made.ir_module), arguments))
    kernel.ptx = getattr(made, "__ptx__", None)
    return kernel
