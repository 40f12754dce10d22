"""The shipped set: which kernels it has, what they depend on, and that building repeats."""

import dataclasses
import enum
import inspect
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from flash_attn4_cute import device, packaged
from flash_attn4_cute.append_plan import AppendKey
from flash_attn4_cute.build import cubin, shipped, sources
from flash_attn4_cute.combine_plan import CombineKey
from flash_attn4_cute.compiler import gpu_arch, with_target
from flash_attn4_cute.device import TARGETS, VARIANTS, Card
from flash_attn4_cute.kernel_keys import DecodeKey, ForwardKey
from flash_attn4_cute.launcher import entry
from flash_attn4_cute.launcher.integers import operation

from .conftest import ROOT

# Two kernels that append and one forward: seconds to compile, and all that a package is made of.
FORWARD = "ForwardKey.*torch.float16.*head_dim=64,.*has_right=False.*DENSE"
SUBSET = f"AppendKey.*head_dim=64,.*rotary_dim=0|{FORWARD}"


def run_build(root: Path, processes: int) -> list[Path]:
    """Build the subset from nothing; every file below the output."""
    command = [sys.executable, "-m", "flash_attn4_cute.build", "--root", root]
    command += ["--variants", "sm120f", "--only", SUBSET, "--jobs", processes]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return sorted(p for p in (root / "build").rglob("*") if p.is_file())


def test_two_builds_are_byte_identical(tmp_path):
    """Nothing of the time, an earlier build or who compiled what beside what is in a package."""
    pytest.importorskip("cutlass", reason="needs nvidia-cutlass-dsl")
    found = []
    for processes, name in enumerate(("one", "another"), 1):
        root = tmp_path / name
        root.mkdir()
        for shared in ("build.toml", "torch-ext", "flash_attn4_cute", "LICENSE"):
            (root / shared).symlink_to(ROOT / shared)
        files = run_build(root, processes)
        found.append({str(p.relative_to(root)): p.read_bytes() for p in files})
    one, another = found
    kernels = [name for name in one if name.endswith(".kernel")]
    assert len(kernels) > 2 and all("torch-cuda/variants/sm120f/" in name for name in kernels)
    assert list(one) == list(another)
    assert [name for name in one if one[name] != another[name]] == []
    check_index(tmp_path / "one" / "build" / "torch-cuda" / "variants" / "sm120f")


def check_index(folder: Path) -> None:
    """The index says of each file what is in it."""
    index = json.loads((folder / packaged.INDEX).read_text())
    assert index["target"] == "sm120f"
    keys = {repr(key): key for key in shipped.all_keys()}
    assert {row["file"] for row in index["kernels"]} == {p.name for p in folder.glob("*.kernel")}
    for row in index["kernels"]:
        data = (folder / row["file"]).read_bytes()
        kernel = entry.unpack(data, keys[row["key"]])
        assert row["bytes"] == len(data)
        assert row["family"] == keys[row["key"]].family
        found = {name: asdict(used) for name, used in cubin.resources(kernel.image).items()}
        assert row["kernels"] == [
            found[name] | {"dynamic_shared": k["dynamic_shared"]}
            for name, k in zip(sorted(found), row["kernels"], strict=True)
        ]
        assert all(k["registers"] > 16 for k in row["kernels"])
        shared = {launch.shared_memory for launch in kernel.program.launches}
        assert {k["dynamic_shared"] for k in row["kernels"]} == shared


@pytest.mark.parametrize("variant", VARIANTS.values())
def test_the_set_of_a_variant(variant):
    """Prefill, decoding, appending and merging, each kernel once and for a target of the card."""
    keys = shipped.shipped_keys(variant)
    assert {type(key) for key in keys} == {ForwardKey, DecodeKey, AppendKey, CombineKey}
    assert len(set(map(repr, keys))) == len(keys)
    assert {key.variant for key in keys} <= {t for (v, _), t in TARGETS.items() if v == variant}
    names = [entry.file_name(repr(key)) for key in keys]
    assert len(set(names)) == len(names)


def test_readme_says_what_is_shipped():
    """Its table and its number of kernels are those of the set."""
    readme = (ROOT / "README.md").read_text()
    table = readme[readme.index("| calls | head_dim") :].split("\n\n")[0]
    assert table.splitlines() == shipped.table()
    assert f" {len(shipped.all_keys())} kernels" in readme


def test_cards_of_a_family_share_code():
    assert shipped.shipped_keys("sm120a") == shipped.shipped_keys("sm121a")


def seconds_to_compile(key) -> float:
    """Of one core: of four each, 2026-11-29, and a tenth for what a build does beside compiling.

    By it the set that had 661 kernels takes 1270 s; 1256 were measured.
    """
    if isinstance(key, ForwardKey):
        return 3.6 if key.merged_dim else 2.8  # with splits, a kernel that merges is compiled along
    if isinstance(key, DecodeKey):
        return 1.85 if key.is_split else 0.9
    return 0.3


def test_the_set_is_built_in_time():
    """A full rebuild may take twenty minutes on two cores; a tenth of it is kept free.

    Who adds beyond leaves something out, or makes a kernel serve more calls.
    """
    cores, minutes = 2, 20
    expected = sum(map(seconds_to_compile, shipped.all_keys()))
    assert expected <= 0.9 * cores * minutes * 60


@pytest.mark.parametrize(
    ("capability", "variant"),
    [
        ((8, 9), None), ((9, 0), "sm90a"), ((9, 1), None), ((10, 0), "sm100a"),
        ((10, 1), None), ((10, 3), "sm103a"), ((10, 7), "sm100a"), ((11, 0), None),
        ((12, 0), "sm120a"), ((12, 1), "sm121a"), ((12, 7), "sm120a"), ((13, 0), None),
    ],
)  # fmt: skip
def test_cards_between(capability, variant):
    """Code for a family runs on its later cards; a card of no family is refused."""
    assert Card("a card", capability, 1).variant == variant


def test_thor_is_refused_by_name(monkeypatch):
    """10.1 is what 11.0 was called first: no code for 10.x runs there."""
    monkeypatch.setattr(device, "card", lambda _: Card("Thor", (10, 1), 20))
    with pytest.raises(NotImplementedError, match=r"found 10\.1 \(Thor; it is 11\.0 .*\)\. Use"):
        device.supported_card(torch.device("cuda", 0))
    assert "no variant: found capability 10.1 (Thor; it is 11.0" in device.describe(
        torch.device("cuda", 0)
    )


def test_cards_are_those_of_the_compiler():
    """By what CuTe DSL says of each card it knows: our code for it runs there, or none does."""
    enums = pytest.importorskip("cutlass.base_dsl.enums", reason="needs nvidia-cutlass-dsl")
    cards = [arch for arch in enums.Arch if arch.major >= 9 and arch.suffix == "a"]
    assert len(cards) >= 7
    targets = {enums.Arch[gpu_arch(target)] for target in TARGETS.values()}
    for card in cards:
        variant = Card("a card", (card.major, card.minor), 1).variant
        own = {enums.Arch[gpu_arch(t)] for (v, _), t in TARGETS.items() if v == variant}
        assert all(card.can_run_binary_built_for(target) for target in own), card
        assert own or not any(card.can_run_binary_built_for(t) for t in targets), card
    # The names of 10.1 stand for 11.0 there.
    assert enums.Arch.sm_101a is enums.Arch.sm_110a


def test_a_change_compiles_what_it_touches():
    """Each kind of kernel depends on its own files and on what these import."""
    keys = {type(key).__name__ + key.family: key for key in shipped.all_keys()}
    package = sources.PACKAGE
    found = {
        name: {str(path.relative_to(package)) for path in sources.sources_of(key)}
        for name, key in keys.items()
    }
    names = ("ForwardKeysm120", "ForwardKeysm100", "DecodeKeysm120", "AppendKeysm120")
    assert set(found) == {*names, "CombineKeysm120"}
    assert "sm100/softmax.py" in found["ForwardKeysm100"]
    assert not any(name.startswith("sm100/") for name in found["ForwardKeysm120"])
    assert "sm120/decode_work.py" in found["DecodeKeysm120"]
    assert "sm120/decode_work.py" not in found["ForwardKeysm120"]
    assert "common/mask.py" in found["DecodeKeysm120"] & found["ForwardKeysm100"]
    assert not any(name.startswith("common/mask") for name in found["AppendKeysm120"])
    for name, files in found.items():
        assert {"compiler.py", "signature.py", "launcher/host_code.py"} <= files, name
        assert not files & {"validation.py", "plan.py", "launch.py"}, name


def test_what_is_traced_is_among_the_sources():
    """The other way round: no module of device code is imported that the digest leaves out."""
    devices = {
        path
        for folder in ("sm100", "sm120", "common")
        for path in (sources.PACKAGE / folder).glob("*.py")
        if "cute.jit" in path.read_text()
    }
    covered = {path for key in shipped.all_keys() for path in sources.sources_of(key)}
    assert devices <= covered, sorted(devices - covered)


def test_what_defines_a_key_is_among_the_sources():
    """Tracing reads properties of keys too, which decide what is traced but not the key's text."""
    kinds = {type(key).__name__ + key.family: key for key in shipped.all_keys()}
    for name, key in kinds.items():
        covered = {str(path) for path in sources.sources_of(key)}
        for part in parts_of(key):
            kind = type(part)
            if issubclass(kind, enum.Enum):  # names alone, which the key's text has
                own = set(vars(kind)) - set(vars(enum.Enum("Plain", [*kind.__members__])))
                assert not own, f"{kind} has {own} beside its members"
            else:
                assert inspect.getfile(kind) in covered, f"{kind} is not digested for {name}"
                outside = files_run_by_properties(part) - covered
                assert not outside, f"properties of {kind} call into {outside}"


def files_run_by_properties(value) -> set[str]:
    """Files of the package in which something runs when the properties of `value` are read."""
    found = set()

    def note(frame, event, argument):
        if event == "call":
            found.add(frame.f_code.co_filename)

    names = [name for name, x in vars(type(value)).items() if isinstance(x, property)]
    sys.setprofile(note)
    try:
        for name in names:
            getattr(value, name)
    finally:
        sys.setprofile(None)
    return {path for path in found if path.startswith(str(sources.PACKAGE))}


def parts_of(value):
    """Of a key, all that is defined in this package."""
    if type(value).__module__.startswith("flash_attn4_cute"):
        yield value
    for f in dataclasses.fields(value) if dataclasses.is_dataclass(value) else ():
        yield from parts_of(getattr(value, f.name))


def test_targets_are_those_of_every_family():
    for key in shipped.all_keys():
        assert key.variant in TARGETS.values()
    for variant in VARIANTS.values():
        key = next(k for k in shipped.append_keys(variant))
        assert with_target(key).variant == TARGETS[variant, "sm120"]


@pytest.mark.parametrize(
    ("name", "width", "to", "operands", "expected"),
    [
        ("add", 32, 32, (2**32 - 1, 2), 1),
        ("sdiv", 32, 32, (2**32 - 7, 2), 2**32 - 3),  # -7 / 2 is -3
        ("srem", 32, 32, (2**32 - 7, 2), 2**32 - 1),
        ("udiv", 32, 32, (2**32 - 7, 2), 2**31 - 4),
        ("sext", 32, 64, (2**32 - 1,), 2**64 - 1),
        ("zext", 32, 64, (2**32 - 1,), 2**32 - 1),
        ("trunc", 64, 32, (2**40 + 5,), 5),
        ("slt", 32, 1, (2**32 - 1, 0), 1),
        ("ult", 32, 1, (2**32 - 1, 0), 0),
        ("smin", 32, 32, (2**32 - 1, 3), 2**32 - 1),
        ("ashr", 32, 32, (2**32 - 8, 1), 2**32 - 4),
        ("abs", 64, 64, (2**64 - 9,), 9),
        ("select", 32, 32, (0, 5, 6), 6),
        ("ceil_log2", 32, 8, (1,), 0),
        ("ceil_log2", 32, 8, (1025,), 11),
    ],
)
def test_arithmetic_is_llvms(name, width, to, operands, expected):
    assert operation(name, width, to)(*operands) == expected
