"""The kernels beside packages that reach into CuTe DSL."""

import subprocess
import sys

from .conftest import ROOT

# What quack-kernels 0.6.5 does on import: a wrapper without the converter's later keyword.
AS_QUACK_DOES = """
import cutlass.cute._tvm_ffi_args_spec_converter as converter
original = converter._convert_single_arg
def patched(arg, arg_name, arg_type, ctx):
    return original(arg, arg_name, arg_type, ctx)
converter._convert_single_arg = patched

import torch
from flash_attn4_cute.compiler import compile_kernel
from flash_attn4_cute.kernel_keys import ForwardKey
from flash_attn4_cute.problem import Layout
from flash_attn4_cute.rules import BandRule
from flash_attn4_cute.tiles import FORWARD_ROWS
key = ForwardKey(
    variant="sm120a", dtype=torch.float16,
    cfg=FORWARD_ROWS[1], rule=BandRule(False, True),
    q_layout=Layout.VARLEN, kv_layout=Layout.VARLEN,
    has_seqused_q=False, has_seqused_k=True, has_lse=True,
)
print("compiled", callable(compile_kernel(key)))
"""


def test_compiles_after_quack_replaced_the_argument_converter():
    """vLLM, SGLang and upstream flash-attn-4 import quack; its patch once broke our compilation."""
    done = subprocess.run(
        [sys.executable, "-c", AS_QUACK_DOES], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.endswith("compiled True\n"), done.stderr
