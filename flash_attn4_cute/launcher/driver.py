"""The calls of the CUDA driver that loading and launching kernels take, by ctypes."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from typing import Any

import torch

SHARED_BYTES = 1  # CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
MAX_SHARED_OPTIN = 97  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
NO_CONTEXT = (3, 201)  # CUDA_ERROR_NOT_INITIALIZED, CUDA_ERROR_INVALID_CONTEXT
_word = ctypes.c_void_p.from_param
Ints = tuple[int, ...]
RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED

_current_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
# What code made by torch.compile allocates with: (shape, strides, dtype) on the current device, at
# half the price of torch.empty.
_empty_strided = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)


class Driver:
    """One process's CUDA driver, or what stands in for it in `library`."""

    def __init__(self, library: Any):
        self.library = library
        # Called with arguments that are ready: without argument types nothing is converted.
        self.launch = library.cuLaunchKernelEx

    def load(self, image: bytes) -> int:
        """Load machine code; the driver keeps a copy of its own, a stand-in may not."""
        handle = ctypes.c_void_p()
        none = ctypes.c_void_p()
        code = ctypes.c_char_p(image)
        with self._while_capturing():
            self.check(
                self.library.cuLibraryLoadData(
                    ctypes.byref(handle), code, none, none, 0, none, none, 0
                ),
                "cuLibraryLoadData",
            )
        assert handle.value is not None
        return handle.value

    def kernel(self, library: int, name: str) -> int:
        """The kernel `name` of a loaded library, for every device."""
        handle = ctypes.c_void_p()
        error = self.library.cuLibraryGetKernel(
            ctypes.byref(handle), ctypes.c_void_p(library), ctypes.c_char_p(name.encode())
        )
        self.check(error, "cuLibraryGetKernel")
        assert handle.value is not None
        return handle.value

    def set_attribute(self, kernel: int, number: int, value: int | None, device: int) -> None:
        """Set an attribute of a kernel on a device; None: as much shared memory as there is."""
        handle = ctypes.c_void_p(kernel)
        with self._while_capturing():
            if value is None:
                most, taken = ctypes.c_int(), ctypes.c_int()
                self.check(
                    self.library.cuDeviceGetAttribute(ctypes.byref(most), MAX_SHARED_OPTIN, device),
                    "cuDeviceGetAttribute",
                )
                self.check(
                    self.library.cuKernelGetAttribute(
                        ctypes.byref(taken), SHARED_BYTES, handle, device
                    ),
                    "cuKernelGetAttribute",
                )
                value = most.value - taken.value
            self.check(
                self.library.cuKernelSetAttribute(number, value, handle, device),
                "cuKernelSetAttribute",
            )

    def stream(self, device: int) -> int:
        """PyTorch's current stream of a device."""
        if _current_raw_stream is not None:
            return _current_raw_stream(device)
        return torch.cuda.current_stream(device).cuda_stream

    def current_device(self) -> int:
        """PyTorch's current device."""
        return torch._C._cuda_getDevice()

    def empty(self, shape: Ints, strides: Ints, dtype: torch.dtype) -> torch.Tensor:
        """A new tensor on the current device."""
        return torch.empty_strided(shape, strides, dtype=dtype, device="cuda")

    def fill(self, address: int, number: int, word: int, stream: int) -> None:
        """Fill `number` words of 32 bits on a stream of the current device."""
        # Each has a register of 64 bits, and of 32 bits that are asked for the lower half.
        arguments = (_word(address), _word(word), _word(number), _word(stream))
        error = self.library.cuMemsetD32Async(*arguments)
        if error:
            if error in NO_CONTEXT:
                self.attach(self.current_device())
                error = self.library.cuMemsetD32Async(*arguments)
            self.check(error, "cuMemsetD32Async")

    def on(self, device: int) -> Any:
        """A context in which `device` is the current one."""
        return torch.cuda.device(device)

    def attach(self, device: int) -> None:
        """Give this thread PyTorch's context of `device`: a thread starts without one."""
        context = ctypes.c_void_p()
        self.check(self.library.cuInit(0), "cuInit")
        self.check(
            self.library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device),
            "cuDevicePrimaryCtxRetain",
        )
        self.check(self.library.cuCtxSetCurrent(context), "cuCtxSetCurrent")

    def check(self, error: int, what: str) -> None:
        """Raise RuntimeError if `error` is one."""
        if error:
            name = ctypes.c_char_p()
            self.library.cuGetErrorName(error, ctypes.byref(name))
            found = name.value.decode() if name.value else "an unknown error"
            raise RuntimeError(f"{what} of the CUDA driver returned {error}: {found}")

    @contextlib.contextmanager
    def _while_capturing(self) -> Any:
        """Allow what a capturing stream would forbid: nothing here is part of a graph."""
        mode = ctypes.c_int(RELAXED)
        self.library.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
        try:
            yield
        finally:
            self.library.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


@functools.cache
def cuda_driver() -> Driver:
    """The driver of this machine.

    Raises:
        RuntimeError: there is none, or it is too old.
    """
    try:
        library = ctypes.CDLL("libcuda.so.1")
        driver = Driver(library)
        for name in ("cuLibraryLoadData", "cuLibraryGetKernel", "cuKernelSetAttribute"):
            getattr(library, name)
    except (OSError, AttributeError) as error:
        raise RuntimeError(
            f"flash-attn-4 needs NVIDIA's driver for CUDA 12 or newer ({error})"
        ) from error
    # Calls that are made at each launch, straight.
    if _current_raw_stream is not None:
        driver.stream = _current_raw_stream  # type: ignore[method-assign]
    if _empty_strided is not None:
        driver.empty = _empty_strided  # type: ignore[method-assign]
    driver.current_device = torch._C._cuda_getDevice  # type: ignore[method-assign]
    return driver
