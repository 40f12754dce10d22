"""What a release of vLLM promises to an attention backend, read from its sources without importing.

    python -m tests.vllm.contract vllm==0.33.0      # records it in tests/vllm/contracts/

vLLM has no stable interface for backends. So the names, fields and signatures that the plugin
meets are kept for each release that it claims to work with, and test_contract.py holds it to them.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CONTRACTS = Path(__file__).parent / "contracts"
# Module -> what is recorded of it in full; of every module, the names that can be imported from it.
MODULES = {
    "vllm/v1/attention/backend.py": (
        "AttentionBackend",
        "AttentionCGSupport",
        "AttentionImpl",
        "AttentionImplBase",
        "AttentionMetadataBuilder",
        "AttentionType",
        "CommonAttentionMetadata",
        "MultipleOf",
    ),
    "vllm/v1/attention/backends/registry.py": ("register_backend",),
    "vllm/v1/attention/selector.py": ("AttentionSelectorConfig",),
    "vllm/_custom_ops.py": ("reshape_and_cache_flash",),
    "vllm/logger.py": ("init_logger",),
    "vllm/vllm_flash_attn/flash_attn_interface.py": (),
}
UNPACKED = re.compile(r"^\s+([\w, ]+) = _flash_attn_fwd\(", re.M)
PASSED = re.compile(r"= _flash_attn_fwd\((.*?)\n        \)", re.S)


def contract(root: Path) -> dict:
    """The contract of the release whose package `vllm` lies in `root`."""
    modules = {}
    for path, recorded in MODULES.items():
        tree = ast.parse((root / path).read_text())
        tops = {name: node for node in tree.body for name in _names(node)}
        modules[path] = {
            "names": sorted(name for name in tops if name in recorded),
            **{name: _describe(tops[name]) for name in recorded if name in tops},
        }
    source = (root / "vllm/vllm_flash_attn/flash_attn_interface.py").read_text()
    (unpacked,), (passed,) = UNPACKED.findall(source), PASSED.findall(source)
    modules["vllm/vllm_flash_attn/flash_attn_interface.py"] = {
        "results of _flash_attn_fwd": len(unpacked.split(",")),
        "keywords of _flash_attn_fwd": re.findall(r"^ {12}(\w+)=", passed, re.M),
    }
    return modules


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    return []


def _describe(node: ast.stmt) -> dict | list[str]:
    if isinstance(node, ast.FunctionDef):
        return _parameters(node)
    assert isinstance(node, ast.ClassDef)
    fields = [
        target.id
        for statement in node.body
        for target in _targets(statement)
        if isinstance(target, ast.Name)
    ]
    methods = {
        member.name: _parameters(member)
        for member in node.body
        if isinstance(member, ast.FunctionDef)
    }
    return {"fields": fields, "methods": methods}


def _targets(statement: ast.stmt) -> list[ast.expr]:
    if isinstance(statement, ast.AnnAssign):
        return [statement.target]
    return statement.targets if isinstance(statement, ast.Assign) else []


def _parameters(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return names + [f"*{a.arg}" for a in (arguments.vararg, arguments.kwarg) if a is not None]


def recorded() -> dict[str, dict]:
    """Every contract in tests/vllm/contracts/, by release."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(CONTRACTS.glob("*.json"))}


def record(requirement: str) -> Path:
    """Fetch a release with pip and write its contract down."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["download", "--quiet", "--no-deps", "--only-binary", ":all:", "-d", folder]
        subprocess.run([sys.executable, "-m", "pip", *command, requirement], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        release = wheel.name.split("-")[1]
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [n for n in archive.namelist() if n in MODULES])
        found = contract(Path(folder))
    CONTRACTS.mkdir(exist_ok=True)
    path = CONTRACTS / f"{release}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    return path


if __name__ == "__main__":
    print(record(sys.argv[1]))
