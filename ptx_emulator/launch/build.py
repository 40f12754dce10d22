"""Builds the launch shim once per machine, with g++, into a cache directory."""

import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.cpp")
FLAGS = ("-O1", "-shared", "-fPIC", "-std=c++17")


def cache_dir() -> Path:
    """Where built files live: $PTX_EMULATOR_CACHE, else ptx_emulator in the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ptx_emulator"
    return Path(os.environ.get("PTX_EMULATOR_CACHE", default))


def shim_library() -> Path:
    """Path of the built shim; compiles it if this version of the source was not built yet."""
    digest = hashlib.sha1(SOURCE.read_bytes()).hexdigest()[:12]
    target = cache_dir() / f"libptx_emulator_shim_{digest}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    compiler = os.environ.get("CXX", "g++")
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = Path(folder) / target.name
        command = [compiler, *FLAGS, "-o", str(built), str(SOURCE)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise RuntimeError(
                f"the emulator's launch shim needs a C++ compiler, and {compiler!r} was not found: "
                "install g++ or set CXX"
            ) from error
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"building the launch shim failed:\n{error.stderr}") from error
        built.replace(target)
    return target
