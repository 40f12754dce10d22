"""The assembled package: what `get_kernel` is given, and that it is given nothing else."""

from __future__ import annotations

import ast
import importlib
import os
import shutil
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

from flash_attn4_cute.build.recipe import Recipe

from .conftest import BUILD, REPO_ID, ROOT

# What is imported to compile, by a call that has no precompiled kernel.
OPTIONAL = {"cutlass"}
GENERATED = {"_ops.py", "metadata.json", "flash_attn_4/__init__.py"}
BACKENDS = ["cpu", "cuda"]

rust = pytest.importorskip("kernels._rust", reason="digests are made and checked by kernels")


@pytest.fixture(params=BACKENDS)
def variant(request, build) -> Path:
    """One assembled variant."""
    return build / f"torch-{request.param}"


@pytest.fixture
def copy(tmp_path) -> Path:
    """What the build reads, outside any git checkout."""
    shutil.copy(ROOT / "build.toml", tmp_path)
    for directory in ("torch-ext", "flash_attn4_cute"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / directory, tmp_path / directory, ignore=ignore)
    return tmp_path


def tree(directory: Path) -> dict[str, bytes]:
    """Every file below `directory`, compiled Python aside."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def run_build(*arguments: str | Path) -> str:
    """The build's command line, in a process of its own."""
    command = [sys.executable, "-m", "flash_attn4_cute.build", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def run_python(program: str, **environment: str) -> str:
    """What a program prints that is run at the repository's root."""
    command = [sys.executable, "-c", textwrap.dedent(program)]
    environment = {**os.environ, **environment}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def metadata(variant: Path):
    """metadata.json as `kernels` reads it."""
    return rust.Metadata.read_from_file(variant / "metadata.json")


def violations(variant: Path) -> int:
    """How many files differ from the digest in metadata.json."""
    digest = metadata(variant).digest
    try:
        digest.validate(rust.Digest.hash_variant(digest.algorithm, variant))
    except rust.DigestValidationError as error:
        return len(error.violations)
    return 0


def test_build_toml_is_accepted():
    backends = {str(backend).lower() for backend in rust.Build.open(ROOT).general.backends}
    assert backends == set(BACKENDS)


def test_one_name_everywhere():
    general = tomllib.loads((ROOT / "build.toml").read_text())["general"]
    assert general["hub"]["repo-id"] == REPO_ID
    for user in ("Makefile", "README.md", "examples/generate.py"):
        assert REPO_ID in (ROOT / user).read_text(), user


def test_card_renders():
    """kernel-builder fills CARD.md with minijinja, whose syntax is Jinja2's."""
    jinja2 = pytest.importorskip("jinja2")
    template = jinja2.Environment(trim_blocks=True, undefined=jinja2.StrictUndefined)
    card = template.from_string((ROOT / "CARD.md").read_text()).render(
        repo_id=REPO_ID,
        version=1,
        functions=["flash_attn_func"],
        layers=None,
        has_benchmark=True,
        upstream=None,
        source=None,
        license="apache-2.0",
    )
    assert card.startswith("---\nlibrary_name: kernels\nlicense: apache-2.0\ntags:")
    assert f'get_kernel("{REPO_ID}", version=1' in card
    assert "- `flash_attn_func`" in card


def test_metadata(variant):
    found = metadata(variant)
    backend = variant.name.removeprefix("torch-")
    assert str(found.name) == "flash-attn-4"
    assert found.version == 1
    assert found.license == "Apache-2.0"
    assert found.id.startswith(f"_flash_attn_4_{backend}_") and found.id.isidentifier()
    assert str(found.backend.backend_type).lower() == backend
    assert found.python_depends == [], "a missing package would keep the kernel from loading"


@pytest.mark.parametrize(
    ("capability", "admitted"),
    [
        ((8, 0), False),
        ((8, 9), False),
        ((9, 0), True),
        ((10, 0), True),
        ((10, 1), True),
        ((10, 3), True),
        ((11, 0), False),
        ((12, 0), True),
        ((12, 1), True),
    ],
)
def test_capabilities(build, capability, admitted):
    archs = pytest.importorskip("kernels.archs")
    declared = metadata(build / "torch-cuda").backend.archs
    assert any(archs._cuda_arch_supports(arch, capability) for arch in declared) == admitted


def test_digest_validates(variant):
    assert violations(variant) == 0


@pytest.mark.parametrize("tamper", ["change", "add", "remove"])
def test_digest_detects_tampering(variant, tmp_path, tamper):
    shutil.copytree(variant, tmp_path / variant.name)
    target = tmp_path / variant.name / "flash_attn4_cute" / "problem.py"
    if tamper == "change":
        target.write_text(target.read_text() + "\n")
    elif tamper == "add":
        target.with_name("added.py").write_text("")
    else:
        target.unlink()
    assert violations(tmp_path / variant.name) == 1


def test_variants_hold_the_same_tree(build):
    trees = [tree(build / f"torch-{backend}") for backend in BACKENDS]
    for files in trees:
        del files["metadata.json"]
    assert trees[0] == trees[1]


def test_flake_stages_the_same_tree(copy):
    run_build("--root", copy)
    run_build("--root", copy, "--stage", copy / "staged")
    shipped = tree(copy / "build" / "torch-cuda")
    staged = tree(copy / "staged" / "torch-ext" / "flash_attn_4")
    assert staged == {name: text for name, text in shipped.items() if name not in GENERATED}
    assert not any(name.startswith("flash_attn4_cute/build/") for name in staged)


def test_flake_stages_kernels_that_were_compiled_before(copy, tmp_path):
    """kernel-builder ships what build.toml's pyext names, and kernels are among it."""
    folder = tmp_path / "kernels"
    for name in ("sm90a/one.kernel", "sm90a/index.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    noarch = tomllib.loads((ROOT / "build.toml").read_text())["torch-noarch"]
    assert {"kernel", "json"} <= set(noarch["pyext"])
    options = ("--root", copy, "--stage", copy / "staged", "--precompiled")
    run_build(*options, folder)
    staged = copy / "staged" / "torch-ext" / "flash_attn_4" / "variants"
    assert tree(staged) == tree(folder) != {}
    with pytest.raises(subprocess.CalledProcessError):
        run_build(*options, copy / "torch-ext")


def test_build_depends_on_the_sources_only(copy, tmp_path):
    run_build("--root", copy, "--output", tmp_path / "one")
    run_build("--root", copy, "--output", tmp_path / "two")
    run_build("--root", copy, "--output", tmp_path / "two")
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_a_package_beyond_its_limit_is_not_written(tmp_path, monkeypatch):
    assemble = importlib.import_module("flash_attn4_cute.build.assemble")
    recipe = Recipe.read(ROOT)
    kernels = tmp_path / "kernels" / "sm90a"
    kernels.mkdir(parents=True)
    monkeypatch.setattr(assemble, "LIMIT", 2_000_000)
    small = assemble.assemble(recipe, tmp_path / "small", kernels.parent)
    assert 0 < max(variant.num_bytes for variant in small) < 2_000_000
    (kernels / "large.kernel").write_bytes(bytes(2_000_000))
    with pytest.raises(ValueError, match=r"torch-cuda would have 2\.\d MB.* 2 MB.*shipped\.py"):
        assemble.assemble(recipe, tmp_path / "large", kernels.parent)
    assert not (tmp_path / "large" / "torch-cuda").exists()


def test_id_outside_git_follows_the_contents(copy):
    def build_id() -> str:
        run_build("--root", copy)
        return metadata(copy / "build" / "torch-cpu").id.rsplit("_", 1)[1]

    first = build_id()
    assert len(first) == 7 and int(first, 16) >= 0
    source = copy / "flash_attn4_cute" / "problem.py"
    source.write_text(source.read_text() + "\n")
    assert build_id() != first


def test_id_in_git_is_the_tree_of_head(copy):
    if shutil.which("git") is None:
        pytest.skip("needs git")

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
        command = ["git", "-C", str(copy), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def build_id() -> str:
        run_build("--root", copy)
        return metadata(copy / "build" / "torch-cpu").id

    git("init", "--quiet")
    git("add", "build.toml", "torch-ext", "flash_attn4_cute")
    git("commit", "--quiet", "--message=sources")
    clean = f"_flash_attn_4_cpu_{git('rev-parse', 'HEAD^{tree}')[:7]}"
    assert build_id() == clean
    (copy / "build.toml").write_text((copy / "build.toml").read_text() + "\n")
    assert build_id() == clean + "_dirty"


def test_imports_are_relative_or_declared(variant):
    """What is loaded under a generated id can import itself only relatively."""
    allowed = sys.stdlib_module_names | {"torch"} | OPTIONAL
    strangers = set()
    for path in variant.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            roots = {name.split(".")[0] for name in names}
            strangers |= {f"{path.relative_to(variant)}: {root}" for root in roots - allowed}
    assert not strangers


ATTENTION_ON_CPU = """
    import sys
    import torch
    sys.modules["cutlass"] = sys.modules["tvm_ffi"] = None  # importing either raises
    from kernels import get_local_kernel
    from pathlib import Path
    fa4 = get_local_kernel(Path("build/torch-cpu"))
    assert "torch._dynamo" not in sys.modules, "it takes seconds to import"
    q, k, v = (torch.randn(1, 4, 2, 8, requires_grad=True) for _ in range(3))
    out = fa4.flash_attn_func(q, k, v, causal=True)
    out.sum().backward()
    print(out.isfinite().all().item(), q.grad is not None, fa4.__name__)
"""


def test_cpu_variant_needs_no_cutlass(build):
    name = metadata(build / "torch-cpu").id
    assert run_python(ATTENTION_ON_CPU) == f"True True {name}"


def test_loaded_by_name(fa4):
    kernels = pytest.importorskip("kernels")
    loaded = {entry.module: entry for entry in kernels.get_loaded_kernels()}[fa4]
    assert Path(fa4.__file__).parent.parent == BUILD
    assert loaded.metadata.id == fa4.__name__


def test_local_kernel_describes_itself(build):
    description = run_python(
        """
        from kernels import get_local_kernel
        from pathlib import Path
        print(get_local_kernel(Path("build")).describe())
        """
    )
    assert "cpu" in description or "sm_" in description


def test_two_loads_in_one_process(build):
    """The same build reached by two paths runs its top level, and so registers its ops, twice."""
    program = """
        import os
        import torch
        from kernels import get_local_kernel
        from pathlib import Path
        q = torch.randn(1, 4, 2, 8)
        for path in (Path("build"), Path(os.getcwd()) / "build"):
            fa4 = get_local_kernel(path)
            print(torch.compile(fa4.flash_attn_func, backend="eager")(q, q, q).shape)
    """
    assert run_python(program).splitlines() == ["torch.Size([1, 4, 2, 8])"] * 2


def test_compatibility_directory_forwards(variant, fa4):
    program = "import flash_attn_4; print(*sorted(flash_attn_4.__all__))"
    assert run_python(program, PYTHONPATH=str(variant)) == " ".join(sorted(fa4.__all__))
