"""Compiled kernels on disk, so that the next process need not compile them again.

    <folder>/<digest>.o     the object that CuTe DSL exports: machine code and its launcher
    <folder>/<digest>.json  vouches for it: the key in words, the object's size and SHA-256

The digest covers the kernel's key, these sources, the versions of the compiler and its runtime, and
the host's processor, for which launchers are compiled: whatever differs has an entry of its own.
Files are renamed into place, the one that vouches last, so processes may write one entry at the
same time. An entry that is not what it says is deleted and made again.

The folder is $FLASH_ATTN_4_CACHE, or flash-attn-4 in the user's cache folder (XDG base directory
specification); FLASH_ATTN_4_CACHE=0 switches the cache off.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

logger = logging.getLogger("flash_attn_4")

FUNCTION = "flash_attn_4"  # name of the launcher in every object
DISTRIBUTIONS = ("nvidia-cutlass-dsl-libs-base", "apache-tvm-ffi")


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
    place, entry = folder(), _entry(key)
    if entry is None:
        return "compiled at the first call of this kernel, then kept for the process"
    if entry.with_suffix(".json").exists():
        return f"compiled earlier, read from {place} at the first call of this kernel"
    return f"compiled at the first call of this kernel, then kept in {place}"


def load(key: Any) -> Any | None:
    """The kernel for `key` as an earlier process compiled it, or None."""
    entry = _entry(key)
    if entry is None or not entry.with_suffix(".json").exists():
        return None
    code = entry.with_suffix(".o")
    try:
        said = json.loads(entry.with_suffix(".json").read_text())
        if said != _vouch(key, code.read_bytes()):
            raise ValueError("the object is not the one that was written")
        import cutlass.cute as cute

        return getattr(cute.runtime.load_module(str(code), enable_tvm_ffi=True), FUNCTION)
    except Exception as error:  # whatever is wrong with it, compiling anew is right
        logger.warning("cache entry %s is not usable (%s); it is made again", entry.name, error)
        with contextlib.suppress(OSError):
            for suffix in (".json", ".o"):
                entry.with_suffix(suffix).unlink(missing_ok=True)
        return None


def store(key: Any, compiled: Any) -> None:
    """Keep the kernel for `key` for later processes. A cache that cannot be written is no error."""
    entry = _entry(key)
    if entry is None:
        return
    mine = entry.with_name(f"{entry.name}-{os.getpid()}")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        compiled.export_to_c(str(mine), FUNCTION)
        vouch = json.dumps(_vouch(key, mine.read_bytes()), indent=1)
        mine.replace(entry.with_suffix(".o"))
        mine.write_text(vouch)
        mine.replace(entry.with_suffix(".json"))
    except Exception as error:  # the kernel is compiled: the call goes on whatever happened here
        logger.warning("cannot write to the cache %s: %s", entry.parent, error)
        with contextlib.suppress(OSError):
            mine.unlink(missing_ok=True)


def _entry(key: Any) -> Path | None:
    """Path of an entry without its suffix; None if `key` has none."""
    place = folder()
    if place is None or holds_function(key):
        return None
    identity = "\n".join((repr(key), *_surroundings()))
    return place / hashlib.sha256(identity.encode()).hexdigest()[:40]


def _vouch(key: Any, code: bytes) -> dict[str, Any]:
    return {"key": repr(key), "bytes": len(code), "sha256": hashlib.sha256(code).hexdigest()}


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
    versions = (f"{name} {metadata.version(name)}" for name in DISTRIBUTIONS if _installed(name))
    return (sources.hexdigest(), *versions, platform.machine(), _processor())


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _processor() -> str:
    """The instruction sets of the host."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
