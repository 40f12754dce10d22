"""What `describe` and `explain` say of a kernel's code is what a call then does."""

import json
import sys

import pytest
import torch

from flash_attn4_cute import compiler, device, packaged
from flash_attn4_cute.device import Card
from flash_attn4_cute.launcher import entry
from flash_attn4_cute.launcher.kernel import Kernel
from flash_attn4_cute.launcher.program import Program

from .cross_compile import keys

KERNEL = Kernel(b"machine code", Program((), (), (), (), (), (), ()))
KEY = keys("sm90a")["sm90a_d64_least"]
TARGETED = compiler.with_target(KEY)


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """A package without kernels and an empty cache; nothing is remembered."""
    monkeypatch.setattr(packaged, "folder", lambda: tmp_path / "variants")
    monkeypatch.setenv("FLASH_ATTN_4_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FLASH_ATTN_4_JIT", raising=False)
    monkeypatch.setattr(compiler, "compile_kernel", lambda key: KERNEL)
    compiler.compiled.cache_clear()
    yield
    compiler.compiled.cache_clear()


def forbid(monkeypatch) -> str:
    monkeypatch.setenv("FLASH_ATTN_4_JIT", "0")
    return "FLASH_ATTN_4_JIT=0 forbids compiling"


def uninstall(monkeypatch) -> str:
    monkeypatch.setitem(sys.modules, "cutlass", None)
    return "nvidia-cutlass-dsl is not installed"


OBSTACLES = {"forbidden": (forbid, RuntimeError), "not-installed": (uninstall, ImportError)}


@pytest.mark.parametrize("what", OBSTACLES)
def test_a_call_that_will_raise(monkeypatch, what, tmp_path):
    prevent, error = OBSTACLES[what]
    reason = prevent(monkeypatch)
    said = compiler.origin(KEY)
    assert "raises an error" in said and reason in said and str(tmp_path / "cache") in said
    assert "compiled" not in said.replace("forbids compiling", "")
    with pytest.raises(error):
        compiler.compiled(KEY)


@pytest.mark.parametrize("what", OBSTACLES)
def test_a_call_whose_kernel_was_compiled_earlier(monkeypatch, what, tmp_path):
    pytest.importorskip("cutlass", reason="needs nvidia-cutlass-dsl")
    assert f"then kept in {tmp_path / 'cache'}" in compiler.origin(KEY)
    compiler.compiled(KEY)
    compiler.compiled.cache_clear()
    OBSTACLES[what][0](monkeypatch)
    assert f"read from {tmp_path / 'cache'}" in compiler.origin(KEY)
    assert compiler.compiled(KEY).image == KERNEL.image


def test_a_damaged_entry_is_not_promised(tmp_path, monkeypatch):
    pytest.importorskip("cutlass", reason="needs nvidia-cutlass-dsl")
    compiler.compiled(KEY)
    (path,) = (tmp_path / "cache").iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    assert "compiled (JIT)" in compiler.origin(KEY)
    assert path.exists(), "to explain deletes nothing"


def test_a_file_that_the_package_lost(monkeypatch, caplog):
    """The kernel is compiled with a warning that names it, or the error does where that may not."""
    pytest.importorskip("cutlass", reason="needs nvidia-cutlass-dsl")
    path = packaged.path_of(TARGETED)
    entry.write(path, entry.pack(TARGETED, KERNEL))
    assert "read from the package" in compiler.origin(KEY)
    path.unlink()
    monkeypatch.setenv("FLASH_ATTN_4_JIT", "0")
    with pytest.raises(RuntimeError) as caught:
        compiler.compiled(KEY)
    assert repr(TARGETED) in str(caught.value)
    monkeypatch.delenv("FLASH_ATTN_4_JIT")
    assert compiler.compiled(KEY) is KERNEL
    assert repr(TARGETED) in caplog.text


def package(tmp_path, target: str, families: list[str]) -> None:
    """Kernels of these families for a target, with their index."""
    place = tmp_path / "variants" / target
    place.mkdir(parents=True)
    rows = [{"file": f"{i}.kernel", "family": family} for i, family in enumerate(families)]
    for row in rows:
        (place / row["file"]).write_bytes(b"")
    (place / packaged.INDEX).write_text(json.dumps({"target": target, "kernels": rows}))


def described(monkeypatch, capability) -> str:
    monkeypatch.setattr(device, "card", lambda _: Card("a card", capability, 1))
    return device.describe(torch.device("cuda", 0))


def test_kernels_of_a_card_are_counted(monkeypatch, tmp_path):
    """B300 takes tcgen05 kernels of its own, and those of mma.sync of B200's folder."""
    assert "no kernels are precompiled" in described(monkeypatch, (10, 3))
    package(tmp_path, "sm103f", ["sm100"] * 3)
    package(tmp_path, "sm100f", ["sm100"] * 5 + ["sm120"] * 7)
    assert "; 10 kernels are precompiled" in described(monkeypatch, (10, 3))
    assert "; 12 kernels are precompiled" in described(monkeypatch, (10, 0))
    assert "no kernels are precompiled" in described(monkeypatch, (12, 0))
    (tmp_path / "variants" / "sm103f" / "2.kernel").unlink()
    assert "; 9 kernels are precompiled" in described(monkeypatch, (10, 3))


@pytest.mark.parametrize("text", [None, "", "[]", '{"kernels": [{}]}', "\x00"])
def test_an_index_that_is_missing_or_garbage(monkeypatch, tmp_path, text):
    """It is for people: what it does not say is said to be unknown."""
    package(tmp_path, "sm90a", ["sm120"])
    index = tmp_path / "variants" / "sm90a" / packaged.INDEX
    index.unlink()
    if text is not None:
        index.write_text(text)
    assert "how many kernels are precompiled is not known" in described(monkeypatch, (9, 0))
    entry.write(packaged.path_of(TARGETED), entry.pack(TARGETED, KERNEL))
    assert compiler.compiled(KEY).image == KERNEL.image


@pytest.mark.parametrize("what", [None, *OBSTACLES])
def test_what_becomes_of_other_calls(monkeypatch, what):
    if what is None:
        pytest.importorskip("cutlass", reason="needs nvidia-cutlass-dsl")
        assert "any other is compiled at the first call" in described(monkeypatch, (9, 0))
        return
    reason = OBSTACLES[what][0](monkeypatch)
    said = described(monkeypatch, (9, 0))
    assert "any other is an error unless the cache" in said and reason in said
