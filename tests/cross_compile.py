"""Compile every kernel that the plans can ask of one variant, without a GPU.

usage: python -m tests.cross_compile VARIANT DIRECTORY [decode]

Writes DIRECTORY/<name>.ptx and .cubin for each key and DIRECTORY/keys.json. A process of its own,
because CuTe DSL reads what it is to keep when it is imported.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["CUTE_DSL_KEEP"] = "ptx,cubin"
    os.environ["CUTE_DSL_DUMP_DIR"] = sys.argv[2]

import torch

from flash_attn4_cute.append_plan import AppendKey
from flash_attn4_cute.decode_tiles import decode_rows
from flash_attn4_cute.kernel_keys import DecodeKey, ForwardKey
from flash_attn4_cute.plan import forward_rows
from flash_attn4_cute.problem import Layout
from flash_attn4_cute.rules import BandRule
from flash_attn4_cute.sm100.tiles import PAIR_ROWS
from flash_attn4_cute.tiles import FP8_ROWS

VARIANTS = ("sm90a", "sm100a", "sm103a", "sm120a", "sm121a")
# The tcgen05 kernels differ in little but widths and take long to compile: these stand for all.
HEAD_DIMS = {"sm100a": (64, 128, 192, 256), "sm103a": (96, 128)}
# Of the rows of e4m3, which are the same for every card, all are compiled for one.
FP8_HEAD_DIMS = {"sm90a": (64, 128), "sm100a": (128, 256), "sm103a": (128,), "sm121a": (128,)}


def keys(variant: str) -> dict[str, ForwardKey]:
    """Three keys a row: the least a kernel does, the most, and what prefill runs.

    Of some rows also what chunked prefill runs: pages and split keys; tcgen05 rows have pages of
    their own, and gather them for packed heads and split keys. Of rows of e4m3 that alone.
    """
    least = {
        "dtype": torch.float16, "rule": BandRule(False, False), "layout": Layout.DENSE,
        "used": False, "has_lse": False,
    }  # fmt: skip
    most = {
        "dtype": torch.bfloat16, "rule": BandRule(True, True), "layout": Layout.VARLEN,
        "used": True, "has_lse": True,
    }  # fmt: skip
    prefill = least | {"dtype": torch.bfloat16, "rule": BandRule(False, True), "has_lse": True}
    chunks = most | {"kv_layout": Layout.PAGED}
    fp8_dims = FP8_HEAD_DIMS.get(variant)
    fp8_rows = [row for row in FP8_ROWS if fp8_dims is None or row.head_dim in fp8_dims]
    found = {}
    for cfg in (*forward_rows(variant), *PAIR_ROWS.get(variant, ()), *fp8_rows):
        is_fp8 = cfg in fp8_rows
        if cfg.head_dim not in HEAD_DIMS.get(variant, (cfg.head_dim,)) and not is_fp8:
            continue
        choices = {"least": (cfg, least), "most": (cfg, most), "prefill": (cfg, prefill)}
        choices |= {name: (tiles, chunks) for name, tiles in in_pages(cfg, variant).items()}
        if is_fp8:
            choices = {"fp8": (cfg.paged(16), chunks)}
        for name, (tiles, choice) in choices.items():
            dims = f"d{cfg.head_dim}" + f"_{cfg.head_dim_v}" * (cfg.head_dim_v != cfg.head_dim)
            dims += "_pair" * (cfg in PAIR_ROWS.get(variant, ()))
            found[f"{variant}_{dims}_{name}"] = ForwardKey(
                variant=variant,
                dtype=choice["dtype"],
                cfg=tiles,
                rule=choice["rule"],
                q_layout=choice["layout"],
                kv_layout=choice.get("kv_layout", choice["layout"]),
                has_seqused_q=choice["used"],
                has_seqused_k=choice["used"],
                has_lse=choice["has_lse"],
                has_k_descale=is_fp8,
                has_v_descale=is_fp8,
                merged_dim=cfg.head_dim_v if name in ("chunks", "gathered", "fp8") else 0,
            )
    return found


def in_pages(cfg: Any, variant: str) -> dict[str, Any]:
    """Some rows as prefill from a cache takes them, by name: in pages of 16 keys, or of few."""
    if cfg.head_dim not in (96, 128, 256):
        return {}
    if cfg.family == "sm120":
        return {"chunks": cfg.paged(16)}
    if cfg.ctas == cfg.q_tiles == 2 or (variant == "sm103a" and cfg.head_dim > 96):
        return {}  # such pairs take no pages of 16; sm_100a stands for sm_103a
    gathered = replace(cfg, group=4).in_boxes(1)
    return {"pages": cfg.in_boxes(16), "gathered": gathered}


def decode_keys(variant: str) -> dict[str, DecodeKey]:
    """A key a row, fp8's too: pages, split keys and both bounds; the least, for the first row."""
    most = {
        "dtype": torch.bfloat16, "rule": BandRule(True, True), "q_layout": Layout.VARLEN,
        "kv_layout": Layout.PAGED, "box_n": 16, "is_split": True, "has_seqused_q": True,
        "has_seqused_k": True, "has_kv_batch_idx": False, "has_lse": True,
    }  # fmt: skip
    least = dict.fromkeys(most, False) | {
        "dtype": torch.float16, "rule": BandRule(False, False), "q_layout": Layout.DENSE,
        "kv_layout": Layout.DENSE, "box_n": None,
    }  # fmt: skip
    found = {}
    for configs in (*decode_rows(2, variant).values(), *decode_rows(1, variant).values()):
        for cfg in configs:
            for name, choice in (("most", most), ("least", least))[: 1 + (not found)]:
                d = cfg.head_dim
                found[f"{variant}_d{d}_{cfg.rows}_{cfg.kv_bytes}_{cfg.kv_stages}_{name}"] = (
                    DecodeKey(variant=variant, cfg=cfg, head_dim=d, head_dim_v=d, **choice)
                )
    return found


def append_keys(variant: str) -> dict[str, AppendKey]:
    """Both rotary layouts, vectors and single elements, a packed and paged cache, fp8."""
    plain = {
        "dtype": torch.bfloat16, "head_dim": 128, "head_dim_v": 128, "rotary_dim": 0,
        "interleaved": False, "vector": 8, "packed_new": False, "packed_q": False, "paged": False,
        "has_batch_idx": False,
    }  # fmt: skip
    packed = {"packed_new": True, "packed_q": True, "paged": True}
    choices = {
        "plain": {},
        "halves": {"rotary_dim": 128} | packed,
        "interleaved": {"rotary_dim": 64, "interleaved": True, "has_batch_idx": True},
        "elements": {"rotary_dim": 20, "vector": 1, "dtype": torch.float16} | packed,
        "fp8": {"rotary_dim": 128, "fp8": True, "has_k_descale": True, "has_v_descale": True},
    }
    return {
        f"{variant}_append_{name}": AppendKey(variant=variant, **(plain | choice))
        for name, choice in choices.items()
    }


def main(variant: str, directory: Path, kernels: str = "forward") -> None:
    from flash_attn4_cute.compiler import compile_kernel

    wanted = {"forward": keys, "decode": decode_keys, "append": append_keys}[kernels](variant)
    for name, key in wanted.items():
        kernel = compile_kernel(key)
        (directory / f"{name}.ptx").write_text(kernel.ptx)
        (directory / f"{name}.cubin").write_bytes(kernel.image)
    (directory / "keys.json").write_text(json.dumps(sorted(wanted)))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
