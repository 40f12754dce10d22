"""KernelKey -> compiled callable. The only module that imports cutlass on the host side."""

import functools
import threading

import torch

from .plan import KernelKey
from .problem import Layout

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
def compiled_forward(key: KernelKey):
    """The compiled kernel for `key`; compiles at the first request in the process."""
    with _lock:
        return compile_forward(key)


def compile_forward(key: KernelKey):
    """Compile the forward kernel for `key`; needs no GPU.

    Returns a callable `(ForwardArgs)` that launches on PyTorch's current stream and has
    `__ptx__` and `__cubin__` if CuTe DSL was told to keep them (CUTE_DSL_KEEP=ptx,cubin).
    """
    cutlass = load_cutlass()
    import cutlass.cute as cute

    from .arguments import ForwardArgs
    from .sm120.forward import ForwardSm120

    dtype = {torch.float16: cutlass.Float16, torch.bfloat16: cutlass.BFloat16}[key.dtype]
    batch, heads, heads_kv = cute.sym_int(), cute.sym_int(), cute.sym_int()
    packed_q = key.q_layout is Layout.VARLEN
    packed_k = key.kv_layout is Layout.VARLEN

    def tensor(packed: bool, num_heads):
        shape: tuple = (cute.sym_int(), num_heads, key.cfg.head_dim)
        shape = shape if packed else (batch, *shape)
        strides = (*(cute.sym_int64(divisibility=8) for _ in shape[1:]), 1)
        return cute.runtime.make_fake_tensor(dtype, shape, strides, assumed_align=16)

    def vector(present: bool, scalar, shape):
        strides = (*(cute.sym_int64() for _ in shape[1:]), 1)
        fake = cute.runtime.make_fake_tensor
        return fake(scalar, shape, strides, assumed_align=4) if present else None

    Float32, Int32 = cutlass.Float32, cutlass.Int32
    lse_shape = (heads, cute.sym_int()) if packed_q else (batch, heads, cute.sym_int())
    args = ForwardArgs(
        mQ=tensor(packed_q, heads),
        mK=tensor(packed_k, heads_kv),
        mV=tensor(packed_k, heads_kv),
        mO=tensor(packed_q, heads),
        mLSE=vector(key.has_lse, Float32, lse_shape),
        mCuSeqlensQ=vector(packed_q, Int32, (cute.sym_int(),)),
        mCuSeqlensK=vector(packed_k, Int32, (cute.sym_int(),)),
        mSeqUsedQ=vector(key.has_seqused_q, Int32, (cute.sym_int(),)),
        mSeqUsedK=vector(key.has_seqused_k, Int32, (cute.sym_int(),)),
        softmax_scale=Float32(1.0),
        window_left=Int32(0),
        window_right=Int32(0),
        max_seqlen_q=Int32(0),
    )
    return cute.compile(
        ForwardSm120(dtype, key.cfg, key.rule),
        args,
        cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True),
        options=f"--enable-tvm-ffi --gpu-arch {gpu_arch(key.variant)}",
    )
