"""Folders that do not serve: a call goes on without them, and says so once."""

import errno
import os
import pwd
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flash_attn4_cute import compiler, disk_cache, packaged
from flash_attn4_cute.launcher import entry
from flash_attn4_cute.launcher.kernel import Kernel
from flash_attn4_cute.launcher.program import Program

from .cross_compile import keys

KERNEL = Kernel(b"machine code", Program((), (), (), (), (), (), ()))
KEY = keys("sm90a")["sm90a_d64_least"]
TARGETED = compiler.with_target(KEY)
NOBODY = 65534


@pytest.fixture(autouse=True)
def compiling(monkeypatch):
    """Nothing in a package, and a compiler that is quick; nothing of it is remembered."""
    monkeypatch.setattr(packaged, "load", lambda key: None)
    monkeypatch.setattr(compiler, "load_cutlass", lambda: None)
    monkeypatch.setattr(compiler, "compile_kernel", lambda key: KERNEL)
    monkeypatch.setattr(disk_cache, "_warned", set())
    compiler.compiled.cache_clear()
    yield
    compiler.compiled.cache_clear()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FLASH_ATTN_4_CACHE", str(tmp_path))
    return tmp_path


@contextmanager
def as_stranger(place: Path, mode: int) -> Iterator[None]:
    """Without the rights to a folder that `mode` does not give; root has all of them."""
    is_root = os.geteuid() == 0
    place.chmod(mode)
    if is_root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        place.chmod(0o700)


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that a stranger can reach: pytest's are its user's alone."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        yield Path(name)


def goes_on(caplog, reason: str, warnings: int = 1) -> None:
    """A kernel is compiled, explained and compiled again; a warning names the reason."""
    for _ in range(2):
        assert compiler.compiled(KEY) is KERNEL
        assert "compiled (JIT)" in compiler.origin(KEY)
        compiler.compiled.cache_clear()
    found = [r.getMessage() for r in caplog.records if "going on without it" in r.getMessage()]
    assert len(found) == warnings and all(reason in text for text in found), found


def test_a_user_without_home(monkeypatch, caplog):
    """As a container has one: no HOME, and a number that no name belongs to."""

    def unknown(number):
        raise KeyError(number)

    for name in ("HOME", "XDG_CACHE_HOME", "FLASH_ATTN_4_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    goes_on(caplog, "home")
    assert disk_cache.folder() is None
    assert "kept for the process" in compiler.origin(KEY)


def test_a_home_of_somebody_else(public, monkeypatch, caplog):
    monkeypatch.setenv("HOME", str(public))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("FLASH_ATTN_4_CACHE", raising=False)
    with as_stranger(public, 0o000):
        goes_on(caplog, f"{public}/.cache/flash-attn-4: [Errno 13]", warnings=2)


def test_a_path_that_is_too_long(monkeypatch, caplog):
    monkeypatch.setenv("FLASH_ATTN_4_CACHE", "/tmp/" + "x" * 300)
    goes_on(caplog, "File name too long", warnings=2)


def test_a_folder_for_reading_only(public, monkeypatch, caplog):
    monkeypatch.setenv("FLASH_ATTN_4_CACHE", str(public))
    with as_stranger(public, 0o555):
        goes_on(caplog, "cannot write to")
    disk_cache.store(TARGETED, KERNEL)
    for path in public.iterdir():
        path.chmod(0o444)
    with as_stranger(public, 0o555):
        assert disk_cache.load(TARGETED).image == KERNEL.image
        assert f"read from {public}" in compiler.origin(KEY)


def test_a_read_that_fails_for_now_deletes_nothing(folder, monkeypatch, caplog):
    """Too many open files, for example: the entry is whole."""
    disk_cache.store(TARGETED, KERNEL)
    (path,) = folder.iterdir()
    with monkeypatch.context() as patched:

        def failing(path):
            raise OSError(errno.EMFILE, "Too many open files")

        patched.setattr(Path, "read_bytes", failing)
        assert disk_cache.load(TARGETED) is None and disk_cache.load(TARGETED) is None
    assert path.exists() and disk_cache.load(TARGETED).image == KERNEL.image
    (record,) = caplog.records
    assert str(folder) in record.getMessage() and "Too many open" in record.getMessage()


class HalfWritten:
    """A file on a disk that is full after some bytes."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()

    def write(self, data):
        self.file.write(data[:10])
        self.file.flush()
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("at", ["write", "rename"])
def test_a_full_disk(folder, monkeypatch, caplog, at):
    """Nothing half written stays behind."""
    names = []

    def full(path, target):
        names.append(path.name)
        raise OSError(errno.ENOSPC, "No space left on device")

    def half(path, mode):
        names.append(Path(path).name)
        return HalfWritten(open(path, mode))

    if at == "rename":
        monkeypatch.setattr(Path, "replace", full)
    else:
        monkeypatch.setattr(entry, "open", half, raising=False)
    goes_on(caplog, "No space left")
    assert not list(folder.iterdir())
    # Two containers on one folder may have the same process number: nothing but chance tells.
    assert len(names) == len(set(names)) == 2


def test_an_interrupted_write_leaves_nothing(folder, monkeypatch):
    def interrupted(path, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        entry.write(folder / "x.kernel", b"data")
    assert not list(folder.iterdir())


def test_old_things_are_deleted(folder, monkeypatch):
    """Entries of other sources and what killed processes left, if nobody used them; no others."""
    with monkeypatch.context() as patched:
        patched.setattr(disk_cache, "_sources", lambda: "0123456789abcdef")
        disk_cache.store(TARGETED, KERNEL)
    (foreign,) = folder.iterdir()
    used = foreign.with_name(foreign.name.replace("4.8", "4.7"))
    used.write_bytes(foreign.read_bytes())
    mine = disk_cache._path(TARGETED)
    stale = [mine.with_name(mine.name + ".0011223344556677.tmp"), mine.with_suffix(".lock")]
    kept = [folder / "notes.txt", folder / f"{'0' * 40}.kernel", mine.with_name(mine.name + "-")]
    disk_cache.store(TARGETED, KERNEL)
    long_ago = time.time() - (disk_cache.MAX_DAYS + 1) * 86_400
    for path in (*stale, *kept):
        path.write_text("")
    for path in (foreign, mine, *stale, *kept):
        os.utime(path, (long_ago, long_ago))
    assert disk_cache.load(TARGETED) is not None and mine.stat().st_mtime > long_ago
    os.utime(mine, (long_ago, long_ago))
    disk_cache.store(keys("sm90a")["sm90a_d64_most"], KERNEL)
    left = set(folder.iterdir())
    assert {used, mine, *kept} <= left and not left & {foreign, *stale}


def test_a_relative_xdg_cache_home_is_ignored(monkeypatch, tmp_path):
    """As the specification of these variables asks."""
    monkeypatch.delenv("FLASH_ATTN_4_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for relative in ("relative/folder", "~/folder", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert disk_cache.folder() == tmp_path / ".cache" / "flash-attn-4"


def test_entries_serve_without_a_compiler(folder, monkeypatch):
    """Those of any version then; with one, those of its version."""

    def version(number):
        monkeypatch.setattr(disk_cache, "compiler_version", lambda: number)

    version("4.8.1")
    disk_cache.store(TARGETED, KERNEL)
    version("4.9.0")
    assert disk_cache.load(TARGETED) is None
    version("")
    assert disk_cache.load(TARGETED).image == KERNEL.image
    assert disk_cache.load(keys("sm90a")["sm90a_d64_most"]) is None
    monkeypatch.setattr(disk_cache, "_sources", lambda: "0123456789abcdef")
    assert disk_cache.load(TARGETED) is None


def test_the_newest_version_serves_first(folder, monkeypatch):
    """4.10 is newer than 4.9."""
    for number in ("4.9.2", "4.10.0", "4.10.0rc1", "4.8.1"):
        monkeypatch.setattr(disk_cache, "compiler_version", lambda number=number: number)
        disk_cache.store(TARGETED, KERNEL)
    monkeypatch.setattr(disk_cache, "compiler_version", lambda: "")
    versions = [path.name.rpartition("-")[2] for path in disk_cache._paths(TARGETED)]
    assert versions[-2:] == ["4.9.2.kernel", "4.8.1.kernel"] and len(versions) == 4


@pytest.mark.parametrize("is_let_go", [False, True])
def test_a_process_that_stopped_while_it_compiled(folder, monkeypatch, caplog, is_let_go):
    """It is waited for, not without a word, and not for ever."""
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(disk_cache, "MAX_WAIT", 600 if is_let_go else 0.02)
    monkeypatch.setattr(disk_cache, "_POLL", 0.01)
    with open(disk_cache._path(TARGETED).with_suffix(".lock"), "w") as stopped:
        fcntl.flock(stopped, fcntl.LOCK_EX)
        if is_let_go:
            monkeypatch.setattr(time, "sleep", lambda _: fcntl.flock(stopped, fcntl.LOCK_UN))
        assert compiler.compiled(KEY) is KERNEL
    assert caplog.text.count("waiting for another process") == 1
    assert ("going on without it" in caplog.text) is not is_let_go
    assert disk_cache.load(TARGETED).image == KERNEL.image
