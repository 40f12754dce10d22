"""Many small arrays in one file: an .npz of its own entries costs more than they hold."""

import json
import lzma
from pathlib import Path

import numpy as np


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write named arrays: a line of JSON with names, types and shapes, then all bytes."""
    index = {name: [x.dtype.str, list(x.shape)] for name, x in arrays.items()}
    data = b"".join(np.ascontiguousarray(x).tobytes() for x in arrays.values())
    path.write_bytes(lzma.compress(json.dumps(index).encode() + b"\n" + data, preset=9))


def load(path: Path) -> dict[str, np.ndarray]:
    """The named arrays of a file that `save` wrote."""
    head, _, data = lzma.decompress(path.read_bytes()).partition(b"\n")
    arrays, at = {}, 0
    for name, (kind, shape) in json.loads(head).items():
        count = int(np.prod(shape))
        arrays[name] = np.frombuffer(data, kind, count, at).reshape(shape)
        at += arrays[name].nbytes
    return arrays
