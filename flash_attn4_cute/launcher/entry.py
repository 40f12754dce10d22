"""One compiled kernel as one file, in the package and in the cache.

    a line that names the format, with the SHA-256 of all that follows
    a line of JSON: the key in words, the program of launches
    the machine code, compressed

Nothing in it depends on the host. A file is believed only if every byte is what was written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import lzma
import secrets
from pathlib import Path
from typing import Any

from .kernel import Kernel
from .program import Program

FORMAT = 2
SUFFIX = ".kernel"
TEMPORARY = ".tmp"
# Fixed, so that the same code gives the same bytes wherever it is built.
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]


def digest(*identity: str) -> str:
    """What the file that holds the kernel of this identity is named after."""
    return hashlib.sha256("\n".join(identity).encode()).hexdigest()[:40]


def file_name(*identity: str) -> str:
    """The name of that file."""
    return digest(*identity) + SUFFIX


def pack(key: Any, kernel: Kernel) -> bytes:
    """The file of a kernel."""
    header = {"key": repr(key), "program": kernel.program.to_json()}
    code = lzma.compress(kernel.image, lzma.FORMAT_XZ, lzma.CHECK_NONE, filters=_FILTERS)
    content = json.dumps(header, separators=(",", ":")).encode() + b"\n" + code
    return _first_line(content) + b"\n" + content


def unpack(data: bytes, key: Any) -> Kernel:
    """The kernel in a file.

    Raises:
        ValueError: the file is damaged, or holds another kernel; it says which.
    """
    first, _, content = data.partition(b"\n")
    if first != _first_line(content):
        raise ValueError(f"it is damaged, or of another format than {FORMAT}")
    try:
        head, _, code = content.partition(b"\n")
        header = json.loads(head)
        found = header["key"]
        if found == repr(key):
            return Kernel(lzma.decompress(code), Program.from_json(header["program"]))
    except Exception as error:  # whatever wrote it
        raise ValueError(f"it is no kernel file: {error!r}") from error
    raise ValueError(f"it holds the kernel for {found}")


def _first_line(content: bytes) -> bytes:
    """All that is read of a file before it is believed."""
    return f"flash-attn-4 kernel {FORMAT} {hashlib.sha256(content).hexdigest()}".encode()


def write(path: Path, data: bytes) -> None:
    """Write a file as a whole or not at all, whoever else writes it."""
    # At random: processes of different containers or hosts, on one folder, may share their number.
    mine = path.with_name(f"{path.name}.{secrets.token_hex(8)}{TEMPORARY}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(mine, "xb") as file:
            file.write(data)
        mine.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            mine.unlink(missing_ok=True)
        raise
