"""Kernels that an earlier process compiled: found again, never believed without proof."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flash_attn4_cute import compiler, disk_cache
from flash_attn4_cute.rules import BandRule

from .conftest import ROOT
from .cross_compile import keys


class Exported:
    """What `store` needs of a compiled kernel."""

    def __init__(self, code: bytes = b"machine code"):
        self.code = code

    def export_to_c(self, path: str, name: str) -> None:
        Path(path).write_bytes(self.code)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FLASH_ATTN_4_CACHE", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


@pytest.fixture
def loaded(monkeypatch) -> list[str]:
    """Objects that were handed to CuTe DSL, which takes any of them."""
    runtime = pytest.importorskip("cutlass.cute.runtime", reason="needs nvidia-cutlass-dsl")
    paths: list[str] = []

    def load_module(path: str, enable_tvm_ffi: bool):
        paths.append(path)
        return type("Module", (), {disk_cache.FUNCTION: "the kernel"})

    monkeypatch.setattr(runtime, "load_module", load_module)
    return paths


KEY = BandRule(True, False)  # any value with fields can be a key


def test_written_and_found(folder, loaded):
    assert disk_cache.load(KEY) is None
    disk_cache.store(KEY, Exported())
    assert disk_cache.load(KEY) == "the kernel"
    assert disk_cache.load(BandRule(True, True)) is None
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".o"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda entry: entry.with_suffix(".o").write_bytes(b"machine c"),
        lambda entry: entry.with_suffix(".o").write_bytes(b""),
        lambda entry: entry.with_suffix(".o").write_bytes(b"machine cod!"),
        lambda entry: entry.with_suffix(".o").unlink(),
        lambda entry: entry.with_suffix(".json").write_text(""),
        lambda entry: entry.with_suffix(".json").write_text(
            json.dumps(json.loads(entry.with_suffix(".json").read_text()) | {"key": "sm_100a's"})
        ),
    ],
    ids=["truncated", "empty", "altered", "missing", "empty-voucher", "of-another-card"],
)
def test_spoilt_entries_are_made_again(folder, loaded, caplog, spoil):
    disk_cache.store(KEY, Exported())
    (entry,) = folder.glob("*.json")
    spoil(entry.with_suffix(""))
    assert disk_cache.load(KEY) is None
    assert not loaded, "it was not even tried"
    assert "is made again" in caplog.text
    assert not list(folder.iterdir())
    disk_cache.store(KEY, Exported())
    assert disk_cache.load(KEY) == "the kernel"


def test_an_object_that_does_not_load_is_made_again(folder, monkeypatch, caplog):
    runtime = pytest.importorskip("cutlass.cute.runtime", reason="needs nvidia-cutlass-dsl")

    def refuse(path: str, enable_tvm_ffi: bool):
        raise RuntimeError("not an object")

    monkeypatch.setattr(runtime, "load_module", refuse)
    disk_cache.store(KEY, Exported())
    assert disk_cache.load(KEY) is None
    assert "not an object" in caplog.text


def test_users_functions_have_no_entry(folder):
    """Their text is an address: another process would find a stranger's function."""
    key = BandRule(False, False, mask_mod=lambda *place: True)
    disk_cache.store(key, Exported())
    assert not folder.exists()
    assert "kept for the process" in disk_cache.describe(key)


def test_switched_off(monkeypatch):
    monkeypatch.setenv("FLASH_ATTN_4_CACHE", "0")
    disk_cache.store(KEY, Exported())
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
    disk_cache.store(KEY, Exported())
    assert "cannot write" in caplog.text


def test_a_kernel_that_cannot_be_exported(folder, caplog):
    """The call that compiled it goes on, and nothing is left behind."""

    class Stubborn:
        def export_to_c(self, path: str, name: str) -> None:
            Path(path).write_bytes(b"half")
            raise RuntimeError("no object for you")

    disk_cache.store(KEY, Stubborn())
    assert "no object for you" in caplog.text
    assert not list(folder.iterdir())


def test_jit_forbidden(folder, monkeypatch):
    pytest.importorskip("cutlass", reason="needs nvidia-cutlass-dsl")
    monkeypatch.setenv("FLASH_ATTN_4_JIT", "0")
    key = next(iter(keys("sm90a").values()))
    with pytest.raises(
        RuntimeError, match="FLASH_ATTN_4_JIT=0 forbids compiling.*FLASH_ATTN_4_JIT=1"
    ):
        compiler.compiled.__wrapped__(key)


def test_explained(folder):
    assert f"then kept in {folder}" in disk_cache.describe(KEY)
    disk_cache.store(KEY, Exported())
    assert f"read from {folder}" in disk_cache.describe(KEY)


PROCESS = """
from flash_attn4_cute import compiler
from tests.cross_compile import keys
print(callable(compiler.compiled(keys("sm120a")["sm120a_d64_least"])))
"""


def test_processes_share_what_one_compiled(folder, monkeypatch):
    """Three at once on an empty cache; then one that may not compile."""
    pytest.importorskip("cutlass", reason="needs nvidia-cutlass-dsl")
    command = [sys.executable, "-c", PROCESS]
    pipe = subprocess.PIPE
    crowd = [
        subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) for _ in range(3)
    ]
    for process in crowd:
        out, err = process.communicate(timeout=600)
        assert out.strip() == "True", err[-2000:]
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".o"]
    monkeypatch.setenv("FLASH_ATTN_4_JIT", "0")
    late = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert late.stdout.strip() == "True", late.stderr[-2000:]
