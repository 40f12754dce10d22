"""The two generated Python files of a variant."""

OPS = '''\
"""The operator namespace of this build. Generated; the same file serves every variant."""

import torch

_BACKEND = "cpu" if torch.version.cuda is None else "cuda"
_NAMESPACE = f"_{name}_{{_BACKEND}}_{unique_id}"

ops = getattr(torch.ops, _NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    """`op_name` inside this build's namespace, so that two builds can live in one process."""
    return f"{{_NAMESPACE}}::{{op_name}}"
'''

# `kernels` releases that predate <variant>/__init__.py import <variant>/<name>/__init__.py.
COMPATIBILITY = '''\
"""Forwards to the variant's __init__.py, for old releases of `kernels`. Generated."""

import importlib.util
import sys
from pathlib import Path

_INIT = Path(__file__).resolve().parent.parent / "__init__.py"
# A package name of its own: relative imports inside the kernel resolve against it.
_NAME = f"_{name}_at_{{abs(hash(str(_INIT))):x}}"

if _NAME not in sys.modules:
    _spec = importlib.util.spec_from_file_location(_NAME, _INIT)
    _module = importlib.util.module_from_spec(_spec)
    sys.modules[_NAME] = _module
    _spec.loader.exec_module(_module)

globals().update(
    {{key: value for key, value in vars(sys.modules[_NAME]).items() if not key.startswith("__")}}
)
__all__ = sys.modules[_NAME].__all__
'''
