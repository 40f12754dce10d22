"""Runs precompiled kernels, as they lie in a package, in the emulator.

usage: make build && python -m tests.emulator.packaged [--target sm120f] [--shard 1/8] [--only TEXT]

Each kernel of the package is asked for by a small call of the kind that it ships for, found in the
package, launched, and its answer is judged by the oracle; compiling is forbidden. The machine code
itself cannot run here: the PTX that it was made of, which the build keeps beside it, does.
"""

import argparse
import importlib
import json
import lzma
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch

if __name__ == "__main__":
    import ptx_emulator

    ptx_emulator.bootstrap()

from flash_attn4_cute.append_plan import AppendKey
from flash_attn4_cute.build.shipped import append_keys, combine_keys
from flash_attn4_cute.build.variants import PTX_SUFFIX, cached
from flash_attn4_cute.combine_plan import CombineKey
from flash_attn4_cute.compiler import with_target
from flash_attn4_cute.device import VARIANTS
from flash_attn4_cute.launcher import entry
from ptx_emulator.cli import ours
from ptx_emulator.launch.host import bootstrap
from tests import harness
from tests.append_cases import Append
from tests.cases import Case
from tests.shipped_cases import cases, num_sms
from tests.test_merge import close

from . import test_ours_append, test_ours_merge
from .on_cards import card

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "variants"
# One card each, on which the machine code of a target runs.
CARD_OF = {"sm90a": "sm_90a", "sm100f": "sm_100a", "sm103f": "sm_103a", "sm120f": "sm_120a"}


class Package:
    """The kernels in `folder`; their PTX is found in `cache`."""

    def __init__(self, fa4: ModuleType, folder: Path, cache: Path = CACHE):
        self.fa4, self.folder, self.cache = fa4, folder, cache
        self.taken: set[str] = set()  # files that were read

    @contextmanager
    def in_place(self, package: str) -> Iterator[None]:
        """While it lasts, kernels of the Python package come from the folder or not at all."""
        packaged, compiler = (
            importlib.import_module(f"{package}.{name}") for name in ("packaged", "compiler")
        )
        before = packaged.folder, packaged.path_of, os.environ.get("FLASH_ATTN_4_JIT")

        def path_of(key: Any) -> Path:
            path = before[1](key)
            self.taken.add(path.name)
            return path

        packaged.folder, packaged.path_of = lambda: self.folder, path_of
        os.environ["FLASH_ATTN_4_JIT"] = "0"
        compiler.compiled.cache_clear()
        try:
            yield
        finally:
            packaged.folder, packaged.path_of = before[:2]
            os.environ.pop("FLASH_ATTN_4_JIT")
            if before[2] is not None:
                os.environ["FLASH_ATTN_4_JIT"] = before[2]
            compiler.compiled.cache_clear()

    def remember(self, key: Any) -> str:
        """Tell the emulator the PTX of a kernel; the name of its file in the package."""
        name = entry.file_name(repr(key))
        kernel = entry.unpack((self.folder / key.variant / name).read_bytes(), key)
        ptx = cached(key, self.cache).with_suffix(PTX_SUFFIX)
        bootstrap().remember(lzma.decompress(ptx.read_bytes()).decode(), kernel.image)
        return name

    def run(self, key: Any, case: Case | None) -> None:
        """Answer a call with the kernel of `key`, and judge the answer."""
        name, arch = self.remember(key), CARD_OF[key.variant]
        self.taken.clear()
        kernels = f"{self.fa4.__name__}.flash_attn4_cute"
        if isinstance(key, AppendKey):
            with self.in_place("flash_attn4_cute"):
                test_ours_append.assert_right(small_append(key), arch, 1)
        elif isinstance(key, CombineKey):
            with self.in_place(kernels), card(self.fa4, arch, 1):
                merge(self.fa4, key)
        else:
            call = harness.build(case, torch.device("cpu"))
            sms = patch.object(ours, "NUM_SMS", num_sms(key))
            with self.in_place(kernels), sms, card(self.fa4, arch, 1):
                answer = harness.run(self.fa4, call)
            harness.judge(call, answer)
        assert name in self.taken, f"another kernel answered: {self.taken}"


def small_append(key: AppendKey) -> Append:
    """A call of few tokens that the same kernel answers."""
    return Append(
        layout="paged" if key.paged else "dense",
        rotary="halves" if key.rotary_dim else None,
        rotary_dim=key.rotary_dim or key.head_dim,
        d=key.head_dim,
        d_v=key.head_dim_v,
    )


def merge(fa4: ModuleType, key: CombineKey) -> None:
    """A small merge by the same kernel, judged."""
    out, lse = test_ours_merge.stacked(5 if key.stacked else 2, (1, 6, 3, key.head_dim), key.dtype)
    truth, truth_lse = test_ours_merge.expected(out, lse)
    if key.packed:
        out, lse, truth, truth_lse = out[:, 0], lse[:, 0], truth[0], truth_lse[0]
    if key.stacked:
        got, got_lse = fa4.flash_attn_combine(out, lse.mT, out_dtype=key.out_dtype)
        got_lse = got_lse.mT
    else:
        got, got_lse = fa4.merge_attention_states(out[0], lse[0], out[1], lse[1])
    close(got, truth, key.out_dtype)
    close(got_lse, truth_lse)


def wanted(target: str) -> dict[Any, Case | None]:
    """Every kernel of a target with the call that it is run by; None for those that append."""
    found: dict[Any, Case | None] = {}
    for variant in VARIANTS.values():
        for key, case in cases(variant).items():
            if key.variant == target:
                found.setdefault(key, case)
        for key in (*append_keys(variant), *combine_keys(variant)):
            if with_target(key).variant == target:
                found.setdefault(with_target(key), None)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", action="append", choices=CARD_OF, help="default: all")
    parser.add_argument("--only", default="", help="keys that contain this text")
    parser.add_argument("--shard", default="1/1", help="of these, each Nth from the Ith: I/N")
    parser.add_argument("--package", type=Path, default=ROOT / "build" / "torch-cuda")
    options = parser.parse_args()
    os.environ["FLASH_ATTN_4_CACHE"] = "0"
    from kernels import get_local_kernel

    fa4 = get_local_kernel(ROOT / "build" / "torch-cpu")
    folder, failed = options.package / "variants", 0
    first, step = (int(number) for number in options.shard.split("/"))
    for target in options.target or CARD_OF:
        index = json.loads((folder / target / "index.json").read_text())
        keys = {repr(key): (key, case) for key, case in wanted(target).items()}
        rows = [row for row in index["kernels"] if options.only in row["key"]][first - 1 :: step]
        for done, row in enumerate(rows, 1):
            start = time.monotonic()
            try:
                Package(fa4, folder).run(*keys[row["key"]])
            except Exception as error:
                failed += 1
                print(f"{target} {row['file']} {row['key']}: {error!r}", file=sys.stderr)
            seconds = time.monotonic() - start
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
            print(
                f"{target}: {done} of {len(rows)} run, {failed} failed, {seconds:.0f} s, "
                f"at most {peak} MiB so far",
                flush=True,
            )
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
