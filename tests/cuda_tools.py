"""NVIDIA's tools that read machine code."""

import shutil
from importlib import metadata

import pytest


def find_tool(name: str) -> str:
    """Path of cuobjdump or nvdisasm: its package's, else the one of an installed toolkit."""
    try:
        files = metadata.files(f"nvidia-cuda-{name}") or []
    except metadata.PackageNotFoundError:
        files = []
    packaged = [str(f.locate()) for f in files if f.name == name]
    found = packaged[0] if packaged else shutil.which(name)
    return found or pytest.skip(f"needs {name}: pip install nvidia-cuda-{name}")
