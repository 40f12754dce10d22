"""Attention from the Kernels Hub in a program of your own: load the kernel, call it, ask what ran.

    python examples/hub.py                         # after `make build`
    python examples/hub.py --revision <40 digits>  # from the Hub, a commit that you have chosen

Without --revision, LOCAL_KERNELS makes the Hub's name stand for this checkout's build/ directory.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

REPO_ID = "flash-attn-4-org/flash-attn-4"
BUILD = Path(__file__).resolve().parents[1] / "build"

parser = argparse.ArgumentParser(description="Call flash-attn-4 from the Kernels Hub.")
parser.add_argument("--revision", help="a commit of the Hub's repository, instead of build/")
revision = parser.parse_args().revision
if revision is None:
    os.environ.setdefault("LOCAL_KERNELS", f"{REPO_ID}={BUILD}")

import torch  # noqa: E402
from kernels import get_kernel  # noqa: E402

which = {"revision": revision} if revision else {"version": 1}
fa4 = get_kernel(REPO_ID, trust_remote_code=True, **which)
print(fa4.describe())

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
# Two sequences of 300 and 724 tokens, packed; four query heads share a head of keys and values.
q = torch.randn(1024, 16, 64, device=device, dtype=dtype)
k, v = torch.randn(2, 1024, 4, 64, device=device, dtype=dtype)
starts = torch.tensor([0, 300, 1024], device=device, dtype=torch.int32)
call = (q, k, v, starts, starts, 724, 724)
print(fa4.explain(*call, causal=True))
out = fa4.flash_attn_varlen_func(*call, causal=True)

# The same by PyTorch, one sequence at a time.
for begin, end in ((0, 300), (300, 1024)):
    q_one, k_one, v_one = (x[begin:end].movedim(0, 1).float() for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q_one, k_one, v_one, is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(out[begin:end].movedim(0, 1).float(), expected, atol=2e-2, rtol=2e-2)
print("hub: ok")
