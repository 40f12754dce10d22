"""Upstream flash-attn-4, unmodified, on CPU tensors in the emulator."""

import os
import sys
import types
from typing import Any

import ptx_emulator
from ptx_emulator.session import Session

ARCH = {"sm_90a": "sm_90", "sm_100a": "sm_100", "sm_103a": "sm_103", "sm_120a": "sm_120"}


def _import_without_triton() -> None:
    """quack's autotuner subclasses something of triton's; nothing here runs it."""
    import torch._dynamo  # noqa: F401  (looks at triton too: before the stand-in exists)

    stand_in = types.ModuleType("triton")
    manager = type("FileCacheManager", (), {})
    stand_in.runtime = types.SimpleNamespace(  # type: ignore[attr-defined]
        cache=types.SimpleNamespace(FileCacheManager=manager)
    )
    sys.modules["triton"] = stand_in
    try:
        import quack  # noqa: F401
    finally:
        del sys.modules["triton"]


def interface(emulator: Session) -> Any:
    """Upstream's interface module, whose kernels run on `emulator`."""
    import torch

    arch = emulator.card.arch
    os.environ["FLASH_ATTENTION_ARCH"] = ARCH[arch]
    os.environ["FLASH_ATTENTION_NUM_SMS"] = str(emulator.card.num_sms)
    ptx_emulator.bootstrap()
    if "flash_attn.cute.interface" not in sys.modules:
        _import_without_triton()
    import flash_attn.cute.cache_utils as cache_utils
    import flash_attn.cute.interface as module

    if not hasattr(cache_utils.JITCache, "_plain_getitem"):
        cache_utils.JITCache._plain_getitem = cache_utils.JITCache.__getitem__
    plain = cache_utils.JITCache._plain_getitem

    def through_emulator(cache: Any, key: Any) -> Any:
        function = plain(cache, key)
        return lambda *args: emulator.call(function, *args)

    cache_utils.JITCache.__getitem__ = through_emulator
    torch.Tensor.is_cuda = property(lambda tensor: True)  # type: ignore[method-assign,assignment]
    return module


def compile_only(module: Any, *tensors: Any, **options: Any) -> None:
    """Let upstream compile for tensors of these shapes, as it does for real CUDA tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        module._flash_attn_fwd(*[t.new_empty(t.shape, device="cuda") for t in tensors], **options)
