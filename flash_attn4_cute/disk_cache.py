"""Compiled kernels on disk, so that the next process need not compile them again.

    <folder>/<digest>.kernel     see launcher.entry

The digest covers the kernel's key, these sources and the compiler's version: whatever differs has
an entry of its own. Files are renamed into place, so processes may write one entry at the same
time. An entry that is not what it says is deleted and made again.

The folder is $FLASH_ATTN_4_CACHE, or flash-attn-4 in the user's cache folder (XDG base directory
specification); FLASH_ATTN_4_CACHE=0 switches the cache off.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from .launcher import entry
from .launcher.kernel import Kernel

logger = logging.getLogger("flash_attn_4")

COMPILER = "nvidia-cutlass-dsl-libs-base"


def folder() -> Path | None:
    """Where entries lie, or None if there is no cache."""
    chosen = os.environ.get("FLASH_ATTN_4_CACHE", "")
    if chosen == "0":
        return None
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "flash-attn-4"


def describe(key: Any) -> str:
    """Where the code of `key` comes from in a new process, for people."""
    place, path = folder(), _path(key)
    if path is None:
        return "compiled (JIT) at the first call of this kernel, then kept for the process"
    if path.exists():
        return f"disk cache: compiled earlier, read from {place} at the first call of this kernel"
    return f"compiled (JIT) at the first call of this kernel, then kept in {place}"


def load(key: Any) -> Kernel | None:
    """The kernel for `key` as an earlier process compiled it, or None."""
    path = _path(key)
    if path is None or not path.exists():
        return None
    try:
        return entry.unpack(path.read_bytes(), key)
    except (OSError, ValueError) as error:
        logger.warning("cache entry %s is not usable (%s); it is made again", path.name, error)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        return None


def store(key: Any, kernel: Kernel) -> None:
    """Keep the kernel for `key` for later processes. A cache that cannot be written is no error."""
    path = _path(key)
    if path is None:
        return
    try:
        entry.write(path, entry.pack(key, kernel))
    except Exception as error:  # the kernel is compiled: the call goes on whatever happened here
        logger.warning("cannot write to the cache %s: %s", path.parent, error)


@contextlib.contextmanager
def only_one(key: Any) -> Iterator[None]:
    """Let one process at a time do what follows for `key`, where the file system can tell."""
    path = _path(key)
    try:
        import fcntl

        if path is None:
            raise OSError("no cache")
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_suffix(".lock"), "w")  # noqa: SIM115
        fcntl.flock(lock, fcntl.LOCK_EX)
    except (ImportError, OSError):  # each for itself, then
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(lock.name)
        lock.close()


def _path(key: Any) -> Path | None:
    """Path of an entry; None if `key` has none."""
    place = folder()
    if place is None or holds_function(key):
        return None
    return place / entry.file_name(repr(key), *_surroundings())


def holds_function(value: Any) -> bool:
    """Whether a user's function is part of a key: its text says nothing to another process."""
    if dataclasses.is_dataclass(value):
        return any(holds_function(getattr(value, f.name)) for f in dataclasses.fields(value))
    return callable(value) and not isinstance(value, type)


@functools.cache
def _surroundings() -> tuple[str, ...]:
    """What else a compiled kernel depends on."""
    sources = hashlib.sha256()
    here = Path(__file__).parent
    for path in sorted(here.rglob("*.py")):
        sources.update(str(path.relative_to(here)).encode())
        sources.update(path.read_bytes())
    return (sources.hexdigest(), compiler_version())


def compiler_version() -> str:
    """The version of CuTe DSL, or nothing if it is not installed."""
    try:
        return f"{COMPILER} {metadata.version(COMPILER)}"
    except metadata.PackageNotFoundError:
        return ""
