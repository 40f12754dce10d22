"""Compiles the shipped kernels into a cache by content, and lays them out as a package has them.

    shipped keys --processes--> .cache/variants/<digest>.kernel, .ptx --> variants/<target>/

The digest covers the key, the sources that tracing it reads and the compiler's version, so a change
compiles anew what it touches and nothing else. The same sources give the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import lzma
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from .. import packaged
from ..disk_cache import compiler_version
from ..launcher import entry
from .cubin import as_json
from .sources import digest

PTX_SUFFIX = ".ptx.xz"


def cached(key: Any, cache: Path) -> Path:
    """Where the kernel of `key` lies, or will, with its PTX beside it."""
    return cache / entry.file_name(repr(key), digest(key), compiler_version())


def compile_all(keys: Iterable[Any], cache: Path, processes: int) -> int:
    """Compile what the cache does not have, with a progress bar; the number of kernels compiled.

    Raises:
        RuntimeError: a kernel cannot be compiled; it says which.
    """
    missing = [key for key in keys if not _usable(cached(key, cache), key)]
    if not missing:
        return 0
    from tqdm import tqdm

    cache.mkdir(parents=True, exist_ok=True)
    # A child inherits nothing of CuTe DSL: it reads its settings when it is imported.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(missing)), context, _prepare) as pool:
        jobs = {pool.submit(_compile, key, str(cached(key, cache))): key for key in missing}
        for job in tqdm(as_completed(jobs), "compiling kernels", len(jobs), mininterval=1.0):
            try:
                job.result()
            except Exception as error:
                pool.shutdown(cancel_futures=True)
                raise RuntimeError(f"cannot compile {jobs[job]}: {error}") from error
    return len(missing)


def _usable(path: Path, key: Any) -> bool:
    try:
        entry.unpack(path.read_bytes(), key)
    except (OSError, ValueError):
        return False
    return path.with_suffix(PTX_SUFFIX).exists()


def _prepare() -> None:
    os.environ["CUTE_DSL_KEEP"] = "ptx"
    # Names of what is kept repeat, so each process has a folder of its own.
    os.environ["CUTE_DSL_DUMP_DIR"] = tempfile.mkdtemp(prefix="flash_attn_4_build_")
    logging.getLogger("flash_attn_4").setLevel(logging.ERROR)


def _compile(key: Any, path: str) -> None:
    from ..compiler import compile_kernel

    kernel = compile_kernel(key)
    assert kernel.ptx is not None, "_prepare asks for it"
    target = Path(path)
    entry.write(target.with_suffix(PTX_SUFFIX), lzma.compress(kernel.ptx.encode(), preset=6))
    entry.write(target, entry.pack(key, kernel))
    for kept in Path(os.environ["CUTE_DSL_DUMP_DIR"]).iterdir():
        with contextlib.suppress(OSError):
            kept.unlink()


def write_variants(keys: Iterable[Any], cache: Path, destination: Path) -> list[Path]:
    """Copy compiled kernels to `destination`/<target>/, with an index each; the folders."""
    indices: dict[str, list[dict[str, Any]]] = {}
    for key in keys:
        source = cached(key, cache)
        data = source.read_bytes()
        name = entry.file_name(repr(key))
        folder = destination / key.variant
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / name)
        kernel = entry.unpack(data, key)
        launches = {launch.kernel: launch.shared_memory for launch in kernel.program.launches}
        indices.setdefault(key.variant, []).append(
            {
                "file": name,
                "key": repr(key),
                "family": key.family,
                "bytes": len(data),
                "kernels": [
                    found | {"dynamic_shared": launches.get(kernel_name, 0)}
                    for kernel_name, found in sorted(as_json(kernel.image).items())
                ],
            }
        )
    for target, found in indices.items():
        found.sort(key=lambda row: row["key"])
        text = json.dumps({"target": target, "kernels": found}, indent=1) + "\n"
        (destination / target / packaged.INDEX).write_text(text, encoding="utf-8", newline="\n")
    return [destination / target for target in sorted(indices)]
