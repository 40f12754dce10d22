"""Kernels that an earlier process compiled: found again, never believed without proof."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flash_attn4_cute import compiler, disk_cache, packaged
from flash_attn4_cute.launcher import entry
from flash_attn4_cute.launcher.kernel import Kernel
from flash_attn4_cute.launcher.program import Field, Input, Launch, Program, Step
from flash_attn4_cute.rules import BandRule

from .conftest import ROOT
from .cross_compile import keys

NOTHING = Program((), (), (), (), (), (), ())
KERNEL = Kernel(b"machine code", NOTHING)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FLASH_ATTN_4_CACHE", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


KEY = BandRule(True, False)  # any value with fields can be a key


def test_written_and_found(folder):
    assert disk_cache.load(KEY) is None
    disk_cache.store(KEY, KERNEL)
    found = disk_cache.load(KEY)
    assert (found.image, found.program) == (b"machine code", NOTHING)
    assert disk_cache.load(BandRule(True, True)) is None
    assert [path.suffix for path in folder.iterdir()] == [".kernel"]


def of_another_card(path: Path) -> None:
    path.write_bytes(entry.pack(BandRule(True, True), KERNEL))


def altered(path: Path) -> None:
    other = entry.pack(KEY, Kernel(b"machine c0de", NOTHING))
    path.write_bytes(path.read_bytes().rsplit(b"\n", 1)[0] + b"\n" + other.rsplit(b"\n", 1)[1])


SPOILT = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-8]), "is damaged"),
    "cut-in-the-header": (lambda path: path.write_bytes(path.read_bytes()[:40]), "is damaged"),
    "empty": (lambda path: path.write_bytes(b""), "is damaged"),
    "altered": (altered, "is damaged"),
    "of-another-card": (of_another_card, "has_right=True"),
    "object-of-an-earlier-release": (lambda path: path.write_bytes(b"\x7fELF\0"), "is damaged"),
}


# One of everything that a program can have, in little space.
SMALL = Program(
    (Input((0, 1), "pointer", 64), Input((0, 1), "shape", 32, 2)),
    (1, 128),
    (Step("add", 32, 32, (1, 3)),),
    (Launch("k", (4, 2, 2), (3, 2, 2), 1024, ((4, (2, 1, 1)),), ((8, (Field(0, 8, 0),)),)),),
    (),
    ((0, 0),),
    (),
)


def test_no_damaged_byte_is_believed():
    """Each byte of a file with each of its bits flipped, replaced, left out and doubled."""
    whole = entry.pack(KEY, Kernel(b"machine code", SMALL))
    assert entry.unpack(whole, KEY).program == SMALL
    for at, byte in enumerate(whole):
        before, after = whole[:at], whole[at + 1 :]
        changed = [bytes([byte ^ 1 << bit]) for bit in range(8)]
        for piece in (*changed, bytes([byte ^ 0xFF]), b"", bytes([byte, byte])):
            with pytest.raises(ValueError, match="damaged"):
                entry.unpack(before + piece + after, KEY)


@pytest.mark.parametrize("change", ["unknown step", "no program", "no code"])
def test_what_was_written_wrong_is_no_crash(change):
    """Intact, but not what this release writes."""
    _, head, code = entry.pack(KEY, Kernel(b"machine code", SMALL)).split(b"\n", 2)
    header = json.loads(head)
    if change == "unknown step":
        header["program"]["steps"][0][0] = "multiply by magic"
    elif change == "no program":
        del header["program"]
    else:
        code = b""
    content = json.dumps(header).encode() + b"\n" + code
    with pytest.raises(ValueError, match="no kernel file"):
        entry.unpack(entry._first_line(content) + b"\n" + content, KEY)


@pytest.mark.parametrize("what", SPOILT)
def test_spoilt_entries_are_made_again(folder, caplog, what):
    spoil, why = SPOILT[what]
    disk_cache.store(KEY, KERNEL)
    (path,) = folder.iterdir()
    spoil(path)
    assert disk_cache.load(KEY) is None
    for said in ("not usable, and deleted", why, path.name):
        assert said in caplog.text
    assert not list(folder.iterdir())
    disk_cache.store(KEY, KERNEL)
    assert disk_cache.load(KEY).image == KERNEL.image


@pytest.mark.parametrize("what", SPOILT)
def test_spoilt_files_of_the_package_are_named_and_not_run(tmp_path, monkeypatch, caplog, what):
    spoil, why = SPOILT[what]
    monkeypatch.setattr(packaged, "folder", lambda: tmp_path)
    key = keys("sm90a")["sm90a_d64_least"]
    assert packaged.load(key) is None and not caplog.text
    path = packaged.path_of(key)
    entry.write(path, entry.pack(key, KERNEL))
    assert packaged.load(key).image == KERNEL.image
    path.write_bytes(entry.pack(KEY, KERNEL))
    spoil(path)
    assert packaged.load(key) is None
    assert str(path) in caplog.text


def test_users_functions_have_no_entry(folder):
    """Their text is an address: another process would find a stranger's function."""
    key = BandRule(False, False, mask_mod=lambda *place: True)
    disk_cache.store(key, KERNEL)
    assert not folder.exists()
    assert disk_cache.load(key) is None and not disk_cache.holds(key)


def test_switched_off(monkeypatch):
    monkeypatch.setenv("FLASH_ATTN_4_CACHE", "0")
    disk_cache.store(KEY, KERNEL)
    assert disk_cache.folder() is None
    assert disk_cache.load(KEY) is None


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("FLASH_ATTN_4_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert disk_cache.folder() == tmp_path / "flash-attn-4"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert disk_cache.folder() == Path.home() / ".cache" / "flash-attn-4"


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLASH_ATTN_4_CACHE", str(tmp_path / "file" / "kernels"))
    disk_cache.store(KEY, KERNEL)
    assert "cannot write" in caplog.text


def test_jit_forbidden(folder, monkeypatch):
    pytest.importorskip("cutlass", reason="needs nvidia-cutlass-dsl")
    monkeypatch.setenv("FLASH_ATTN_4_JIT", "0")
    key = next(iter(keys("sm90a").values()))
    with pytest.raises(
        RuntimeError, match="FLASH_ATTN_4_JIT=0 forbids compiling.*FLASH_ATTN_4_JIT=1"
    ):
        compiler.compiled.__wrapped__(key)


PROCESS = """
from flash_attn4_cute import compiler
from tests.cross_compile import append_keys
print(callable(compiler.compiled(append_keys("sm120a")["sm120a_append_plain"])))
"""


def test_processes_share_what_one_compiled(folder, monkeypatch):
    """Eight at once on an empty cache; then one that may not compile."""
    pytest.importorskip("cutlass", reason="needs nvidia-cutlass-dsl")
    command = [sys.executable, "-c", PROCESS]
    pipe = subprocess.PIPE
    crowd = [
        subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) for _ in range(8)
    ]
    compiled = 0
    for process in crowd:
        out, err = process.communicate(timeout=600)
        assert out.strip() == "True", err[-2000:]
        compiled += err.count("compiling it now")
    assert compiled == 1
    assert [path.suffix for path in folder.iterdir()] == [".kernel"]
    monkeypatch.setenv("FLASH_ATTN_4_JIT", "0")
    late = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert late.stdout.strip() == "True", late.stderr[-2000:]
