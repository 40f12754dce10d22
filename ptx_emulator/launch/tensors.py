"""CPU tensors that call themselves CUDA tensors, and the register of the memory behind them.

Host code checks the device of each tensor in its DLPack capsule. Changing that one field lets a CPU
tensor through; the pointer stays the tensor's own, so a kernel works on PyTorch's memory in place.
"""

import ctypes
import dataclasses
from typing import Any

import numpy as np
import torch

CUDA = 2  # kDLCUDA


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
    ]


_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype = ctypes.c_void_p
_pointer_of.argtypes = [ctypes.py_object, ctypes.c_char_p]


class _Capsule:
    """What `tvm_ffi.from_dlpack` asks of an exporter."""

    def __init__(self, capsule: Any) -> None:
        self.capsule = capsule

    def __dlpack__(self, **_: Any) -> Any:
        return self.capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, 0


class Allocations:
    """Byte ranges of global memory that a kernel may touch: the storages of the tensors given."""

    def __init__(self) -> None:
        self.ranges: dict[int, int] = {}
        self.keep: dict[int, Any] = {}
        self.starts = np.zeros(0, np.uint64)
        self.ends = np.zeros(0, np.uint64)

    def add(self, start: int, nbytes: int, owner: Any = None) -> None:
        """Allow `nbytes` from `start`, and keep `owner` alive as long as the register lives."""
        if nbytes <= self.ranges.get(start, 0):
            return
        self.ranges[start] = nbytes
        self.keep[start] = owner
        merged: list[list[int]] = []
        for low, size in sorted(self.ranges.items()):
            if merged and low < merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], low + size)
            else:
                merged.append([low, low + size])
        self.starts = np.array([low for low, _ in merged], np.uint64)
        self.ends = np.array([high for _, high in merged], np.uint64)

    def add_tensor(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.add(storage.data_ptr(), storage.nbytes(), storage)


def as_cuda(tensor: torch.Tensor) -> Any:
    """A tvm_ffi tensor over the memory of a CPU `tensor` that says it lives on cuda:0."""
    import tvm_ffi

    capsule = torch.utils.dlpack.to_dlpack(tensor.detach())
    described = _DLTensor.from_address(_pointer_of(capsule, b"dltensor"))
    described.device_type, described.device_id = CUDA, 0
    return tvm_ffi.from_dlpack(_Capsule(capsule))


def wrap(value: Any, allocations: Allocations) -> Any:
    """`value` with each CPU tensor in it (nested in tuples, lists, dataclasses) as a CUDA one."""
    if isinstance(value, torch.Tensor):
        allocations.add_tensor(value)
        return as_cuda(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*[wrap(item, allocations) for item in value])
    if isinstance(value, tuple | list):
        return type(value)(wrap(item, allocations) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value) if f.init]
        return dataclasses.replace(
            value, **{name: wrap(getattr(value, name), allocations) for name in names}
        )
    return value
