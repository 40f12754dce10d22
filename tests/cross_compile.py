"""Compile every kernel that the plans can ask of one variant, without a GPU.

usage: python -m tests.cross_compile VARIANT DIRECTORY

Writes DIRECTORY/<name>.ptx and .cubin for each key and DIRECTORY/keys.json. A process of its own,
because CuTe DSL reads what it is to keep when it is imported.
"""

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ["CUTE_DSL_KEEP"] = "ptx,cubin"
    os.environ["CUTE_DSL_DUMP_DIR"] = sys.argv[2]

import torch

from flash_attn4_cute.plan import BandRule, ForwardKey, forward_rows
from flash_attn4_cute.problem import Layout

VARIANTS = ("sm90a", "sm120a", "sm121a")


def keys(variant: str) -> dict[str, ForwardKey]:
    """Three keys a row: the least a kernel does, the most, and what prefill runs."""
    least = {
        "dtype": torch.float16, "rule": BandRule(False, False), "layout": Layout.DENSE,
        "used": False, "has_lse": False,
    }  # fmt: skip
    most = {
        "dtype": torch.bfloat16, "rule": BandRule(True, True), "layout": Layout.VARLEN,
        "used": True, "has_lse": True,
    }  # fmt: skip
    prefill = least | {"dtype": torch.bfloat16, "rule": BandRule(False, True), "has_lse": True}
    found = {}
    for cfg in forward_rows(variant):
        for name, choice in (("least", least), ("most", most), ("prefill", prefill)):
            dims = f"d{cfg.head_dim}" + f"_{cfg.head_dim_v}" * (cfg.head_dim_v != cfg.head_dim)
            found[f"{variant}_{dims}_{name}"] = ForwardKey(
                variant=variant,
                dtype=choice["dtype"],
                cfg=cfg,
                rule=choice["rule"],
                q_layout=choice["layout"],
                kv_layout=choice["layout"],
                has_seqused_q=choice["used"],
                has_seqused_k=choice["used"],
                has_lse=choice["has_lse"],
            )
    return found


def main(variant: str, directory: Path) -> None:
    from flash_attn4_cute.compiler import compile_kernel

    for name, key in keys(variant).items():
        kernel = compile_kernel(key)
        (directory / f"{name}.ptx").write_text(kernel.__ptx__)
        (directory / f"{name}.cubin").write_bytes(kernel.__cubin__)
    (directory / "keys.json").write_text(json.dumps(sorted(keys(variant))))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
