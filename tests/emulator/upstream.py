"""Upstream flash-attn-4, unmodified, on CPU tensors in the emulator."""

import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ptx_emulator.session import Session

ARCH = {"sm_90a": "sm_90", "sm_100a": "sm_100", "sm_103a": "sm_103", "sm_120a": "sm_120"}


def _import_without_triton() -> None:
    """quack's autotuner subclasses something of triton's; nothing here runs it.

    quack also replaces a function of CuTe DSL on import, which only its own kernels want.
    """
    import cutlass.cute._tvm_ffi_args_spec_converter as converter
    import torch._dynamo  # noqa: F401  (looks at triton too: before the stand-in exists)

    stand_in = types.ModuleType("triton")
    manager = type("FileCacheManager", (), {})
    stand_in.runtime = types.SimpleNamespace(  # type: ignore[attr-defined]
        cache=types.SimpleNamespace(FileCacheManager=manager)
    )
    sys.modules["triton"] = stand_in
    plain = converter._convert_single_arg
    try:
        import quack  # noqa: F401
    finally:
        converter._convert_single_arg = plain
        del sys.modules["triton"]


def _hardware_of(num_sms: int) -> dict[str, Any]:
    """What `HardwareInfo` of CuTe DSL asks the driver for while it compiles."""
    return {
        "__init__": lambda info, *_, **__: None,
        "get_device_multiprocessor_count": lambda info: num_sms,
        "get_max_active_clusters": lambda info, cluster_size, **_: num_sms // cluster_size,
    }


@contextmanager
def upstream_on(emulator: Session) -> Iterator[Any]:
    """Upstream's interface module; what it launches runs on `emulator`, with CPU tensors."""
    import torch

    arch = emulator.card.arch
    os.environ["FLASH_ATTENTION_ARCH"] = ARCH[arch]
    os.environ["FLASH_ATTENTION_NUM_SMS"] = str(emulator.card.num_sms)
    if "flash_attn.cute.interface" not in sys.modules:
        _import_without_triton()
    import cutlass.cute._tvm_ffi_args_spec_converter as converter
    import flash_attn.cute.interface as module
    from cutlass.utils import HardwareInfo
    from flash_attn.cute.cache_utils import JITCache
    from quack import cute_dsl_utils

    module._get_device_arch.cache_clear()  # it keeps what FLASH_ATTENTION_ARCH was before
    plain = JITCache.__getitem__
    is_cuda = torch.Tensor.is_cuda
    plain_converter = converter._convert_single_arg
    hardware = _hardware_of(emulator.card.num_sms)
    plain_hardware = {name: getattr(HardwareInfo, name) for name in hardware}

    def through_emulator(cache: Any, key: Any) -> Any:
        function = plain(cache, key)
        return lambda *args: emulator.call(function, *args)

    JITCache.__getitem__ = through_emulator
    torch.Tensor.is_cuda = property(lambda tensor: True)  # type: ignore[method-assign,assignment]
    converter._convert_single_arg = cute_dsl_utils._patched_convert_single_arg
    for name, method in hardware.items():
        setattr(HardwareInfo, name, method)
    try:
        yield module
    finally:
        for name, method in plain_hardware.items():
            setattr(HardwareInfo, name, method)
        converter._convert_single_arg = plain_converter
        JITCache.__getitem__ = plain
        torch.Tensor.is_cuda = is_cuda  # type: ignore[method-assign]


def forward(module: Any, q: Any, k: Any, v: Any, **options: Any) -> tuple[Any, Any]:
    """(out, lse) of upstream's forward: compiled for fake CUDA tensors first, as it asks for."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    def fake(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return torch.empty(value.shape, dtype=value.dtype, device="cuda")

    with FakeTensorMode():
        fakes = {name: fake(value) for name, value in options.items()}
        module._flash_attn_fwd(fake(q), fake(k), fake(v), return_lse=True, **fakes)
    return module._flash_attn_fwd(q, k, v, return_lse=True, **options)[:2]


def backward(module: Any, tensors: tuple[Any, ...], **options: Any) -> tuple[Any, ...]:
    """(dq, dk, dv) of upstream's backward for (q, k, v, out, dout, lse); compiled as `forward`."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    def fake(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return torch.empty(value.shape, dtype=value.dtype, device="cuda")

    with FakeTensorMode():
        fakes = {name: fake(value) for name, value in options.items()}
        module._flash_attn_bwd(*map(fake, tensors), **fakes)
    return module._flash_attn_bwd(*tensors, **options)
