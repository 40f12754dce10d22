"""Runs programs on a CUDA card through its driver alone: PTX text in, words out."""

import ctypes
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from .programs import ARCH, Map, Program

Pointer, U64, U32, Int = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_int
_BF16 = 9  # CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class CudaError(RuntimeError):
    """A call of the driver failed. After most errors of a kernel the process has to be given up."""


class Card:
    """Device 0 and its primary context."""

    def __init__(self) -> None:
        self.driver = ctypes.CDLL("libcuda.so.1")
        self.check("cuInit", 0)
        device, context = Int(), Pointer()
        self.check("cuDeviceGet", ctypes.byref(device), 0)
        self.check("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.check("cuCtxSetCurrent", context)
        name, version = ctypes.create_string_buffer(100), Int()
        self.check("cuDeviceGetName", name, 100, device)
        self.check("cuDriverGetVersion", ctypes.byref(version))
        self.name, self.driver_version = name.value.decode(), version.value

    def check(self, function: str, *args: Any) -> None:
        status = getattr(self.driver, function)(*args)
        if status:
            text = ctypes.c_char_p()
            self.driver.cuGetErrorName(status, ctypes.byref(text))
            raise CudaError(f"{function}: {(text.value or b'?').decode()} ({status})")

    def load(self, ptx: str) -> Pointer:
        """The kernel; compiled by the driver, or by ptxas where the driver cannot."""
        module, function = Pointer(), Pointer()
        try:
            self.check("cuModuleLoadData", ctypes.byref(module), ptx.encode() + b"\0")
        except CudaError as error:
            image = _assemble(ptx, error)
            self.check("cuModuleLoadData", ctypes.byref(module), image)
        self.check("cuModuleGetFunction", ctypes.byref(function), module, b"program")
        return function

    def upload(self, words: np.ndarray) -> int:
        address = U64()
        self.check("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(16, words.nbytes)))
        data = words.ctypes.data_as(Pointer)
        self.check("cuMemcpyHtoD_v2", address, data, ctypes.c_size_t(words.nbytes))
        return address.value

    def run(self, program: Program) -> tuple[np.ndarray, bytes]:
        """What the program leaves in `target`, and its tensor map."""
        function = self.load(program.ptx)
        source, target = (self.upload(x) for x in (program.source, program.empty_target()))
        map_ = bytes(128)
        if program.map is not None:
            map_ = self.encode(program.map, target if program.map.over_target else source)
        arguments = [U64(source), U64(target), ctypes.create_string_buffer(map_, 128)]
        pointers = (Pointer * 3)(*[ctypes.addressof(a) for a in arguments])
        self.check("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, program.smem)
        shape = [U32(x) for x in (program.blocks, 1, 1, program.threads, 1, 1, program.smem)]
        self.check("cuLaunchKernel", function, *shape, None, pointers, None)
        self.check("cuCtxSynchronize")
        result = np.zeros(program.words, np.uint32)
        data = result.ctypes.data_as(Pointer)
        self.check("cuMemcpyDtoH_v2", data, U64(target), ctypes.c_size_t(result.nbytes))
        for address in (source, target):
            self.check("cuMemFree_v2", U64(address))
        return result, map_

    def encode(self, map_: Map, address: int) -> bytes:
        """The tensor map as the driver makes it."""
        rank = len(map_.dims)
        room = ctypes.create_string_buffer(128 + 64)
        aligned = ctypes.addressof(room) + 63 & ~63
        self.check(
            "cuTensorMapEncodeTiled",
            Pointer(aligned),
            _BF16,
            U32(rank),
            U64(address),
            (U64 * rank)(*map_.dims),
            (U64 * (rank - 1))(*map_.strides),
            (U32 * rank)(*map_.box),
            (U32 * rank)(*[1] * rank),
            0,
            map_.swizzle,
            0,
            int(map_.nan_fill),
        )
        return ctypes.string_at(aligned, 128)


def _assemble(ptx: str, error: CudaError) -> bytes:
    """A cubin by the ptxas that is on the path or comes with triton."""
    found = shutil.which("ptxas")
    if found is None:
        try:
            import triton
        except ImportError:
            raise error from None
        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "program.ptx"), Path(folder, "program.cubin")
        source.write_text(ptx)
        command = [found, f"-arch={ARCH}", str(source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise CudaError(f"{error}; ptxas: {done.stderr.strip() or done.stdout.strip()}")
        return cubin.read_bytes()
