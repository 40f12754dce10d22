"""One compiled kernel as one file, in the package and in the cache.

    a line of JSON: the key in words, size and SHA-256 of the machine code, the program of launches
    the machine code, compressed

Nothing in it depends on the host. A file is believed only if all of it agrees.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import lzma
import os
from pathlib import Path
from typing import Any

from .kernel import Kernel
from .program import Program

FORMAT = 1
SUFFIX = ".kernel"
# Fixed, so that the same code gives the same bytes wherever it is built.
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]


def file_name(*identity: str) -> str:
    """The name of the file that holds the kernel of this identity."""
    return hashlib.sha256("\n".join(identity).encode()).hexdigest()[:40] + SUFFIX


def pack(key: Any, kernel: Kernel) -> bytes:
    """The file of a kernel."""
    image = kernel.image
    header = {
        "format": FORMAT,
        "key": repr(key),
        "bytes": len(image),
        "sha256": hashlib.sha256(image).hexdigest(),
        "program": kernel.program.to_json(),
    }
    code = lzma.compress(image, lzma.FORMAT_XZ, lzma.CHECK_NONE, filters=_FILTERS)
    return json.dumps(header, separators=(",", ":")).encode() + b"\n" + code


def unpack(data: bytes, key: Any) -> Kernel:
    """The kernel in a file.

    Raises:
        ValueError: the file is not whole, or holds another kernel; it says which.
    """
    try:
        head, _, code = data.partition(b"\n")
        header = json.loads(head)
        image = lzma.decompress(code)
        said = header["format"], header["bytes"], header["sha256"]
        program = Program.from_json(header["program"])
        found = header["key"]
    except Exception as error:
        raise ValueError(f"it is no whole kernel file: {error}") from error
    if found != repr(key):
        raise ValueError(f"it holds the kernel for {found}")
    if said != (FORMAT, len(image), hashlib.sha256(image).hexdigest()):
        raise ValueError("its machine code is not the one that was written")
    return Kernel(image, program)


def write(path: Path, data: bytes) -> None:
    """Write a file as a whole or not at all, whoever else writes it."""
    mine = path.with_name(f"{path.name}-{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        mine.write_bytes(data)
        mine.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            mine.unlink(missing_ok=True)
        raise
