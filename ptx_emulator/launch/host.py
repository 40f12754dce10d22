"""The Python end of the shim: what was launched, and the PTX of every cubin compiled here.

Entry names and dump files are not unique, so PTX is found by the SHA-1 of its cubin.
"""

import ctypes
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .build import shim_library

Dim3 = tuple[int, int, int]


@dataclass(frozen=True)
class Launch:
    """One kernel launch as host code asked for it."""

    kernel: str
    ptx: str
    grid: Dim3
    block: Dim3
    cluster: Dim3
    dynamic_smem: int
    static_smem: int
    stream: int
    params: tuple[bytes, ...]
    attributes: tuple[tuple[int, bytes], ...]


class _Record(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_char_p),
        ("image", ctypes.c_void_p),
        ("image_size", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32 * 3),
        ("num_params", ctypes.c_uint32),
        ("dynamic_smem", ctypes.c_uint64),
        ("static_smem", ctypes.c_uint64),
        ("stream", ctypes.c_void_p),
        ("param_sizes", ctypes.POINTER(ctypes.c_uint32)),
        ("args", ctypes.POINTER(ctypes.c_void_p)),
        ("num_attrs", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("attrs", ctypes.c_void_p),
    ]


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Record))


class Host:
    """The loaded shim. There is one per process, because the DSL loads its runtime once."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(str(shim_library()), mode=ctypes.RTLD_GLOBAL)
        self.ptx_of: dict[str, str] = {}
        self.on_launch: Callable[[Launch], None] | None = None
        self.error: BaseException | None = None
        self._callback = _CALLBACK(self._receive)
        self.library.shim_set_callback(self._callback)

    def set_device(self, major: int, minor: int, num_sms: int) -> None:
        self.library.shim_set_device(major, minor, num_sms)

    @staticmethod
    def set_arch(arch: str) -> None:
        """Let CuTe DSL compile for `arch` and believe that it can run that here."""
        from cutlass.cutlass_dsl import CuTeDSL

        os.environ["CUTE_DSL_ARCH"] = arch
        CuTeDSL._get_dsl().envar.arch = arch

    def remember(self, ptx: str, cubin: bytes) -> None:
        self.ptx_of[hashlib.sha1(cubin).hexdigest()] = ptx

    def _receive(self, pointer: Any) -> int:
        try:
            if self.on_launch is None:
                raise RuntimeError("a kernel was launched outside of ptx_emulator.session()")
            self.on_launch(self._launch(pointer.contents))
        except BaseException as error:  # must not cross the C frames below
            self.error = error
            return 999
        return 0

    def _launch(self, record: Any) -> Launch:
        image = ctypes.string_at(record.image, record.image_size)
        digest = hashlib.sha1(image).hexdigest()
        name = record.kernel.decode()
        if digest not in self.ptx_of:
            raise RuntimeError(
                f"no PTX is known for kernel {name} (cubin {digest}): it must be compiled in this "
                "process after ptx_emulator.bootstrap()"
            )
        params = tuple(
            ctypes.string_at(record.args[i], record.param_sizes[i])
            for i in range(record.num_params)
        )
        raw = ctypes.string_at(record.attrs, 72 * record.num_attrs) if record.num_attrs else b""
        attributes = tuple(
            (int.from_bytes(raw[at : at + 4], "little"), raw[at + 8 : at + 72])
            for at in range(0, len(raw), 72)
        )
        return Launch(
            kernel=name,
            ptx=self.ptx_of[digest],
            grid=tuple(record.grid),
            block=tuple(record.block),
            cluster=tuple(record.cluster),
            dynamic_smem=record.dynamic_smem,
            static_smem=record.static_smem,
            stream=record.stream or 0,
            params=params,
            attributes=attributes,
        )


_host: Host | None = None


def bootstrap() -> Host:
    """Put the shim in the place of the DSL's runtime library; call before cutlass is imported.

    Sets CUTE_DSL_LIBS (the shim) and CUTE_DSL_KEEP (so that compiled functions carry their PTX).

    Raises:
        RuntimeError: cutlass was imported already, so its own runtime library is in place.
    """
    global _host
    if _host is not None:
        return _host
    library = str(shim_library())
    if "cutlass" in sys.modules and os.environ.get("CUTE_DSL_LIBS") != library:
        raise RuntimeError(
            "cutlass was imported before ptx_emulator.bootstrap(): call bootstrap() first, or set "
            f"CUTE_DSL_LIBS={library} before Python starts"
        )
    os.environ["CUTE_DSL_LIBS"] = library
    os.environ["CUTE_DSL_KEEP"] = "ptx,cubin"
    _use_own_directory()
    os.register_at_fork(after_in_child=_use_own_directory)
    _host = Host()
    _watch_compiler(_host)
    return _host


def _use_own_directory() -> None:
    """File names repeat, so two processes that share a directory read each other's kernels.

    A child inherits the variable, hence a directory inside it.
    """
    given = os.environ.get("CUTE_DSL_DUMP_DIR")
    own = tempfile.mkdtemp(prefix="ptx_emulator_", dir=given)
    os.environ["CUTE_DSL_DUMP_DIR"] = own
    if "cutlass.cutlass_dsl" in sys.modules:
        from cutlass.cutlass_dsl import CuTeDSL

        CuTeDSL._get_dsl().envar.dump_dir = own  # read at import


def _watch_compiler(host: Host) -> None:
    """Remember the PTX and cubin of every function that CuTe DSL compiles from now on."""
    from cutlass.base_dsl.jit_executor import JitFunctionArtifacts

    read_files = JitFunctionArtifacts.__post_init__

    def read_and_remember(artifacts: Any) -> None:
        read_files(artifacts)
        if artifacts.PTX and isinstance(artifacts.CUBIN, bytes):
            host.remember(artifacts.PTX, artifacts.CUBIN)

    JitFunctionArtifacts.__post_init__ = read_and_remember
