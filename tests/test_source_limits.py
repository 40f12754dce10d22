"""The rules of style that can be counted: sizes, imports, user errors, words that do not belong."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

MAX_FILE, MAX_LINE = 500, 100
MAX_DEVICE_FUNCTION, MAX_HOST_FUNCTION = 120, 60
MAX_PARAMETERS = 7

SHIPPED = ("flash_attn4_cute/", "torch-ext/")
# Callers depend on these signatures; everything else bundles its arguments.
PUBLIC_API = (
    *(f"torch-ext/flash_attn_4/{f}.py" for f in ("interface", "engine", "ops")),
    "integrations/vllm/flash_attn_4_vllm/impl.py",  # vLLM's
)


def sources() -> list[str]:
    """Every Python file that is, or is about to be, part of the repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if found.returncode:  # a source archive without git
        names = [str(p.relative_to(ROOT)) for p in ROOT.rglob("*.py")]
        return [n for n in names if not n.startswith(("build/", ".", "dist/"))]
    return [name for name in found.stdout.split() if (ROOT / name).is_file()]


SOURCES = sources()
SHIPPED_SOURCES = [name for name in SOURCES if name.startswith(SHIPPED)]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def is_device_code(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Traced by CuTe DSL: decorated with cute.jit or cute.kernel."""
    names = {ast.unparse(decorator).split("(")[0] for decorator in function.decorator_list}
    return bool(names & {"cute.jit", "cute.kernel", "dsl_user_op"})


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Parameters beside self and cls."""
    args = function.args
    named = [a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
    if named and named[0] in ("self", "cls"):
        named = named[1:]
    return len(named) + (args.vararg is not None) + (args.kwarg is not None)


def too_long(source: str, path: str = "x.py") -> list[str]:
    """Every breach of the size limits in one file."""
    lines = source.splitlines()
    found = [] if len(lines) <= MAX_FILE else [f"{path}: {len(lines)} lines"]
    wide = [n for n, line in enumerate(lines, 1) if len(line) > MAX_LINE]
    found += [f"{path}:{n}: longer than {MAX_LINE} columns" for n in wide]
    for function in functions(ast.parse(source)):
        where = f"{path}:{function.lineno}: {function.name}"
        length = function.end_lineno - function.lineno + 1
        limit = MAX_DEVICE_FUNCTION if is_device_code(function) else MAX_HOST_FUNCTION
        exempt = path in PUBLIC_API or path.startswith("tests/")
        if length > limit and not (path in PUBLIC_API and ast.get_docstring(function)):
            found.append(f"{where}: {length} lines, at most {limit}")
        if parameters(function) > MAX_PARAMETERS and not exempt:
            found.append(f"{where}: {parameters(function)} parameters, at most {MAX_PARAMETERS}")
    return found


@pytest.mark.parametrize("name", SOURCES)
def test_sizes(name):
    """A file is read in one sitting, a function on one screen."""
    assert too_long(read(name), name) == []


def test_the_size_limits_bite():
    """The check finds what it is there for."""
    body = "\n".join("    x = 0" for _ in range(61))
    assert len(too_long(f"def f():\n{body}\n")) == 1
    assert too_long(f"@cute.jit\ndef f():\n{body}\n") == []
    assert len(too_long(f"@cute.kernel\ndef f():\n{body}\n{body}\n")) == 1
    assert len(too_long("def f(a, b, c, d, e, f, g, h): pass")) == 1
    assert len(too_long("def f(a, b, c, d, *, e, f, g, h): pass")) == 1
    assert too_long("def f(self, a, b, c, d, e, f, g): pass") == []
    assert len(too_long("x = 1\n" * 501)) == 1
    assert len(too_long("x = '" + "a" * 100 + "'")) == 1


@pytest.mark.parametrize("name", [n for n in SHIPPED_SOURCES if n.startswith("torch-ext/")])
def test_users_never_meet_an_assert(name):
    """The thin layer checks nothing by assert: `python -O` drops it and its message helps nobody.

    `assert x is not None` and `isinstance` are for the type checker and may stand.
    """
    for node in ast.walk(ast.parse(read(name))):
        if isinstance(node, ast.Assert):
            text = ast.unparse(node.test)
            assert "is not None" in text or text.startswith("isinstance("), f"{name}: {text}"


IMPORT_FREE_OF_CUTLASS = ("__init__.py", "problem.py", "validation.py", "checks.py", "mask_rule.py")


@pytest.mark.parametrize("name", SHIPPED_SOURCES)
def test_imports(name):
    """Inside the package only relative imports; cutlass nowhere that a CPU goes."""
    allowed_cutlass = name.startswith("flash_attn4_cute/") and not name.endswith(
        tuple(f"flash_attn4_cute/{f}" for f in IMPORT_FREE_OF_CUTLASS)
    )
    for node in ast.walk(ast.parse(read(name))):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module or ""]
        for module in modules:
            top = module.split(".")[0]
            assert top not in ("flash_attn4_cute", "flash_attn_4"), f"{name}: absolute {module}"
            assert top != "cutlass" or allowed_cutlass, f"{name} imports {module}"
            assert top not in ("quack", "flash_attn", "einops", "triton"), f"{name}: {module}"


COMMON = [n for n in SHIPPED_SOURCES if n.startswith("flash_attn4_cute/common/")]


@pytest.mark.parametrize("name", COMMON)
def test_shared_code_never_asks_for_the_architecture(name):
    """Rule 14: differences enter as objects or table rows."""
    for node in ast.walk(ast.parse(read(name))):
        if isinstance(node, ast.If | ast.IfExp | ast.Compare):
            test = node if isinstance(node, ast.Compare) else node.test
            text = ast.unparse(test).replace("cute.arch.", "")  # the DSL's module of intrinsics
            assert not re.search(r"\b(arch|sm_?\d+|capability)\b", text), f"{name}: {text}"


@pytest.mark.parametrize("name", SHIPPED_SOURCES)
def test_traced_modules_keep_their_annotations(name):
    """`from __future__ import annotations` in a traced module crashes the DSL's compiler."""
    text = read(name)
    if re.search(r"^\s*(import cutlass|from cutlass)", text, re.M) and "Constexpr" in text:
        assert "from __future__ import annotations" not in text


TEXT_SUFFIXES = (".py", ".md", ".toml", ".nix", ".yaml", ".yml", ".cfg", ".sh", ".json", ".cpp")
# Spelt in pieces, so that this file does not find itself.
FORBIDDEN = {
    "a path of one machine": re.compile(r"(?<![\w.])/(?:work|root|home|mnt|Users)/[\w.]"),
    "a private registry": re.compile(r"(?:index-url|extra-index)\s*=?\s*https?://(?!pypi\.org)"),
    "an unfinished thought": re.compile(r"\b(?:TO" r"DO|FIX" r"ME|X" r"XX|HA" r"CK)\b"),
    "a number of our tracker": re.compile(r"(?<![\w#])(?:[Ii]ssue|ticket) #?\d+\b"),
}


def texts() -> list[str]:
    command = ["git", "ls-files"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split()
    names = found or SOURCES
    return [n for n in names if n.endswith(TEXT_SUFFIXES) or "/" not in n]


@pytest.mark.parametrize("name", [n for n in texts() if (ROOT / n).is_file()])
def test_words_that_do_not_belong(name):
    """No path of one machine, no private host, nothing left for later."""
    for number, line in enumerate(read(name).splitlines(), 1):
        for what, pattern in FORBIDDEN.items():
            assert not pattern.search(line), f"{name}:{number}: {what}: {line.strip()}"


def test_every_shipped_module_says_what_it_is():
    """A docstring at the top of each file, and of each public function and class."""
    bare = []
    for name in SHIPPED_SOURCES:
        tree = ast.parse(read(name))
        if read(name).strip() and not ast.get_docstring(tree):
            bare.append(name)
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                bare += [] if ast.get_docstring(node) else [f"{name}: {node.name}"]
    assert bare == []
