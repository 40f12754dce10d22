"""Compiled kernels on disk, so that the next process need not compile them again.

    <folder>/<sources>-<key>-<version>.kernel     see launcher.entry

The name says what an entry was made of: digests of these sources and of the kernel's key, and the
compiler's version; whatever differs has an entry of its own. Where the compiler is not installed,
an entry of any version serves. Files are renamed into place, so processes may write one entry at
the same time; they wait for one that compiles the same, at most MAX_WAIT. An entry that is not
what it says is deleted and made again; a folder that cannot be read or written is no error, but as
if there were none.

The folder is $FLASH_ATTN_4_CACHE, or flash-attn-4 in the user's cache folder (XDG base directory
specification); FLASH_ATTN_4_CACHE=0 switches the cache off.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import logging
import os
import re
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from .launcher import entry
from .launcher.kernel import Kernel

logger = logging.getLogger("flash_attn_4")

COMPILER = "nvidia-cutlass-dsl-libs-base"
LOCK = ".lock"
# What nobody asked for in so long is deleted if these sources cannot ask for it either.
MAX_DAYS = 30
# Seconds, several times what a kernel takes: who compiles it then is stopped, or on another host.
MAX_WAIT = 300
_POLL = 0.1
_MAX_LOOKED_AT = 10_000  # files, at each entry that is written
_OURS = re.compile(r"([0-9a-f]{16})-[0-9a-f]{40}-[^/]*(\.kernel|\.lock|\.tmp)")
_warned: set[tuple[str, Path]] = set()


def folder() -> Path | None:
    """Where entries lie, or None if there is no cache."""
    chosen = os.environ.get("FLASH_ATTN_4_CACHE", "")
    if chosen == "0":
        return None
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        if chosen:
            return Path(chosen).expanduser()
        # A relative path there is to be ignored, says the specification.
        base = base if os.path.isabs(base) else "~/.cache"
        return Path(base).expanduser() / "flash-attn-4"
    except RuntimeError as error:  # nobody knows the user's home
        _warn_once("find", Path(chosen or base), error)
        return None


def holds(key: Any) -> bool:
    """Whether `load` would find the kernel for `key`; changes nothing."""
    return any(isinstance(found, Kernel) for _, found in _readings(key))


def load(key: Any) -> Kernel | None:
    """The kernel for `key` as an earlier process compiled it, or None."""
    for path, found in _readings(key):
        if isinstance(found, Kernel):
            with contextlib.suppress(OSError):
                os.utime(path)  # the time of its last use
            return found
        logger.warning("cache entry %s is not usable, and deleted: %s", path, found)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    return None


def store(key: Any, kernel: Kernel) -> None:
    """Keep the kernel for `key` for later processes. A cache that cannot be written is no error."""
    place = folder()
    try:
        path = _path(key)
        if path is None:
            return
        entry.write(path, entry.pack(key, kernel))
    except Exception as error:  # the kernel is compiled: the call goes on whatever happened here
        _warn_once("write to", place or Path(), error)
        return
    with contextlib.suppress(OSError):
        _clean(path.parent)


@contextlib.contextmanager
def only_one(key: Any) -> Iterator[None]:
    """Let one process at a time do what follows for `key`, where the file system can tell."""
    lock = _locked(key)
    try:
        yield
    finally:
        if lock is not None:
            with contextlib.suppress(OSError):
                os.unlink(lock.name)
            lock.close()


def _locked(key: Any) -> IO[str] | None:
    """The file that this process holds the lock of, or None: each for itself, then."""
    try:
        import fcntl  # noqa: F401

        path = _path(key)
        if path is None:
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_suffix(LOCK), "w")  # noqa: SIM115
    except (ImportError, OSError):
        return None
    try:
        if _taken(lock):
            return lock
    except OSError:
        pass
    lock.close()
    return None


def _taken(lock: IO[str]) -> bool:
    """Wait for the lock, and say so; False if it was not let go of in MAX_WAIT seconds."""
    import fcntl

    end = None
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            now = time.monotonic()
        if end is None:
            end = now + MAX_WAIT
            logger.warning("waiting for another process that compiles a kernel: %s", lock.name)
        elif now >= end:
            text = "waited for another process %d seconds, going on without it: %s"
            logger.warning(text, MAX_WAIT, lock.name)
            return False
        time.sleep(_POLL)


def _readings(key: Any) -> Iterator[tuple[Path, Kernel | ValueError]]:
    """Entries that may be of `key`: the kernel in each, or what is wrong with it.

    What cannot be read is as if it were not there: it may be whole, and another time readable.
    """
    try:
        paths = _paths(key)
    except OSError as error:
        _warn_unless_missing(folder() or Path(), error)
        return
    for path in paths:
        try:
            yield path, entry.unpack(path.read_bytes(), key)
        except ValueError as error:
            yield path, error
        except OSError as error:
            _warn_unless_missing(path.parent, error)


def _paths(key: Any) -> list[Path]:
    """Where entries of `key` may lie; without a compiler, of any version, the newest first."""
    path = _path(key)
    if path is None:
        return []
    if compiler_version():
        return [path]
    stem = path.name.removesuffix(entry.SUFFIX)
    names = [n for n in os.listdir(path.parent) if n.startswith(stem) and n.endswith(entry.SUFFIX)]

    def version(name: str) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", name.removeprefix(stem))]

    return [path.parent / name for name in sorted(names, key=version, reverse=True)]


def _path(key: Any) -> Path | None:
    """Path of an entry; None if `key` has none."""
    place = folder()
    if place is None or holds_function(key):
        return None
    name = f"{_sources()}-{entry.digest(repr(key))}-{compiler_version()}{entry.SUFFIX}"
    return place / name


def holds_function(value: Any) -> bool:
    """Whether a user's function is part of a key: its text says nothing to another process."""
    if dataclasses.is_dataclass(value):
        return any(holds_function(getattr(value, f.name)) for f in dataclasses.fields(value))
    return callable(value) and not isinstance(value, type)


def _clean(place: Path) -> None:
    """Delete entries of other sources, and what killed processes left, of more than MAX_DAYS."""
    oldest = time.time() - MAX_DAYS * 86_400
    with os.scandir(place) as files:
        for file in itertools.islice(files, _MAX_LOOKED_AT):
            ours = _OURS.fullmatch(file.name)
            if ours is None or ours.groups() == (_sources(), entry.SUFFIX):
                continue
            with contextlib.suppress(OSError):
                if file.stat().st_mtime < oldest:
                    os.unlink(file.path)


def _warn_unless_missing(place: Path, error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        _warn_once("read", place, error)


def _warn_once(doing: str, place: Path, error: Exception) -> None:
    """Say, once for a folder, that the cache does not serve."""
    if (doing, place) not in _warned:
        _warned.add((doing, place))
        text = "cannot %s the cache of compiled kernels %s: %s; going on without it"
        logger.warning(text, doing, place, error)


@functools.cache
def _sources() -> str:
    """A digest of all sources that decide what is compiled, and more."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for path in sorted(here.rglob("*.py")):
        digest.update(str(path.relative_to(here)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def compiler_version() -> str:
    """The version of CuTe DSL, or nothing if it is not installed."""
    try:
        return metadata.version(COMPILER)
    except metadata.PackageNotFoundError:
        return ""
