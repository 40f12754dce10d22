"""A loaded kernel: its machine code on the card, and calls that are ready to be repeated.

    arguments --Program--> ReadyCall: parameters, grid, launch attributes in one block of memory
    ReadyCall + addresses + stream --> cuLaunchKernelEx

All that a launch passes but addresses is decided by shapes, strides and scalars. So a call is
worked out once for these, and repeated by writing addresses over those of the first one.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Sequence
from typing import Any

from . import driver as drivers
from .driver import NO_CONTEXT, Driver
from .integers import signed
from .program import POINTER, Launch, Program, evaluate

_ALIGN = 128  # of parameters, for descriptors among them
_PARAM = struct.Struct("<Q")
# CUlaunchConfig: grid, block, shared memory, (padding), stream, attributes, their number.
_CONFIG = struct.Struct("<7I4xQQI4x")
_STREAM_AT = 32
_ATTRIBUTE = struct.Struct("<I4x16I")
_MAX_READY = 4096
# An argument as ctypes makes one of an object at each call: made once, it costs a call nothing.
_pointer = ctypes.c_void_p.from_param
# (which 64-bit word of a call's memory, which of the addresses of a launch, its distance from it);
# the stream counts as the address behind those of the tensors.
Patches = Sequence[tuple[int, int, int]]
Writes = Sequence[tuple[int, int]]  # (which word, which of the addresses)


class ReadyCall:
    """The launches of one call, to be repeated with other addresses."""

    def __init__(self, kernel: Kernel, driver: Driver, device: int, inputs: list[int]):
        self.driver, self.device = driver, device
        self.lock = threading.Lock()
        program = kernel.program
        slots = evaluate(program, kernel.functions, inputs)
        layout = _Layout(program)
        self.memory = ctypes.create_string_buffer(layout.size + _ALIGN)
        self.base = -(-ctypes.addressof(self.memory) // _ALIGN) * _ALIGN
        start = self.base - ctypes.addressof(self.memory)
        self.bytes = memoryview(self.memory).cast("B")[start : start + layout.size]
        self.words = (ctypes.c_uint64 * (layout.size // 8)).from_buffer(self.bytes)
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        followed = dict(program.follows)
        pointers = kernel.pointer_numbers
        patches: list[tuple[int, int, int]] = []
        for launch, places in zip(program.launches, layout.launches, strict=True):
            for place, (_, fields) in zip(places.params, launch.params, strict=True):
                for field in fields:
                    value = slots[field.slot]
                    at = place + field.offset
                    self.bytes[at : at + field.size] = value.to_bytes(field.size, "little")
                    source = followed.get(field.slot)
                    if source is not None:
                        distance = signed((value - inputs[source]) % 2**64, 64)
                        patches.append((at // 8, pointers[source], distance))
            self._write_launch(launch, places, slots)
            patches.append(((places.config + _STREAM_AT) // 8, len(pointers), 0))
            config, table = (_pointer(self.base + at) for at in (places.config, places.table))
            handle = _pointer(kernel.handle(launch.kernel, device))
            self.calls.append((config, handle, table, None))
        self.patches = tuple(patches)
        (self.writes,), self.derived = apart([self.patches], len(pointers) + 1)
        # A grid without CTAs is nothing to do, and an error for the driver.
        self.empty = [not all(slots[x] for x in launch.grid) for launch in program.launches]
        if any(self.empty):
            self.calls = [c for c, none in zip(self.calls, self.empty, strict=True) if not none]

    def _write_launch(self, launch: Launch, places: _Places, slots: list[int]) -> None:
        for i, at in enumerate(places.params):
            _PARAM.pack_into(self.bytes, places.table + 8 * i, self.base + at)
        for i, (number, words) in enumerate(launch.attributes):
            words = (*words, *[0] * (16 - len(words)))
            at = places.attributes + _ATTRIBUTE.size * i
            _ATTRIBUTE.pack_into(self.bytes, at, number, *words)
        sizes = [slots[x] for x in (*launch.grid, *launch.block)]
        attributes = self.base + places.attributes, len(launch.attributes)
        _CONFIG.pack_into(self.bytes, places.config, *sizes, launch.shared_memory, 0, *attributes)

    def launch(self, addresses: list[int]) -> None:
        """Launch on PyTorch's current stream with these addresses, one for each tensor."""
        driver, device = self.driver, self.device
        addresses.append(driver.stream(device))
        for source, distance in self.derived:
            addresses.append(addresses[source] + distance)
        if driver.current_device() == device:
            self.issue(self.writes, addresses)
        else:
            with driver.on(device):
                self.issue(self.writes, addresses)

    def issue(self, writes: Writes, addresses: Sequence[int]) -> None:
        """Launch with `addresses` written where `writes` say, while the device is current."""
        words, launch, lock = self.words, self.driver.launch, self.lock
        lock.acquire()  # at half the price of a with block, at every launch
        try:
            for at, source in writes:
                words[at] = addresses[source]
            for call in self.calls:
                error = launch(*call)
                if error:
                    self._recover(error, call)
        finally:
            lock.release()

    def _recover(self, error: int, call: tuple) -> None:
        """A thread that PyTorch has not used yet has no context."""
        if error in NO_CONTEXT:
            self.driver.attach(self.device)
            error = self.driver.launch(*call)
        self.driver.check(error, "cuLaunchKernelEx")


def apart(steps: Sequence[Patches], number: int) -> tuple[list[Writes], Writes]:
    """What several calls write, and the few addresses at a distance from others.

    The latter, as (which address, distance), follow the first `number` addresses in a list: so the
    loop that writes addresses, the longest of a launch, need not add.
    """
    far = ((source, distance) for patches in steps for _, source, distance in patches if distance)
    derived = tuple(dict.fromkeys(far))
    where = {pair: number + i for i, pair in enumerate(derived)}
    writes: list[Writes] = [
        tuple((at, where.get((source, distance), source)) for at, source, distance in patches)
        for patches in steps
    ]
    return writes, derived


class _Places:
    """Where the parts of one launch lie in the memory of a call."""

    def __init__(self, launch: Launch, at: int):
        self.params = []
        for size, _ in launch.params:
            self.params.append(at)
            at += -(-size // _ALIGN) * _ALIGN
        self.table = at
        self.attributes = at + 8 * len(launch.params)
        self.config = self.attributes + _ATTRIBUTE.size * len(launch.attributes)
        self.end = -(-(self.config + _CONFIG.size) // _ALIGN) * _ALIGN


class _Layout:
    """Where the launches of a program lie in the memory of a call."""

    def __init__(self, program: Program):
        self.launches: list[_Places] = []
        self.size = 0
        for launch in program.launches:
            self.launches.append(_Places(launch, self.size))
            self.size = self.launches[-1].end


class Kernel:
    """Machine code with a program of its launches. Called like what CuTe DSL compiles."""

    ptx: str | None = None  # what the machine code was made of, where it was compiled

    def __init__(self, image: bytes, program: Program):
        self.image, self.program = image, program
        self.functions = program.functions()
        pointers = [i for i, found in enumerate(program.inputs) if found.kind == POINTER]
        self.pointer_numbers = {source: n for n, source in enumerate(pointers)}
        self.pointer_inputs = [program.inputs[i] for i in pointers]
        self._free = [i for i in pointers if i not in program.decisive]
        self._lock = threading.Lock()
        self._loaded: tuple[Driver, int] | None = None
        self._handles: dict[tuple[str, int], int] = {}
        self._ready: dict[tuple, ReadyCall] = {}

    def __call__(self, arguments: Any) -> ReadyCall:
        """Launch on PyTorch's current stream of the tensors' device; the call, to be repeated."""
        addresses = [found.read((arguments,)) for found in self.pointer_inputs]
        ready = self.ready((arguments,))
        ready.launch(addresses)
        return ready

    def ready(self, arguments: tuple) -> ReadyCall:
        """The call with these arguments, worked out at the first one of its kind."""
        inputs = [found.read(arguments) for found in self.program.inputs]
        driver = drivers.cuda_driver()
        device = self._device(arguments)
        fixed = list(inputs)
        for i in self._free:
            fixed[i] = 0
        key = (id(driver), device, *fixed)
        ready = self._ready.get(key)
        if ready is None:
            if len(self._ready) >= _MAX_READY:
                self._ready.clear()
            ready = self._ready[key] = ReadyCall(self, driver, device, inputs)
        return ready

    def load(self, device: int) -> None:
        """Load the machine code for `device` now, and not at the first launch there."""
        for launch in self.program.launches:
            self.handle(launch.kernel, device)

    def _device(self, arguments: tuple) -> int:
        found: Any = arguments
        for index in self.pointer_inputs[0].path:
            found = found[index]
        return found.device.index or 0

    def handle(self, name: str, device: int) -> int:
        """The driver's handle of a kernel, loaded and made ready for `device`."""
        driver = drivers.cuda_driver()
        with self._lock:
            if self._loaded is None or self._loaded[0] is not driver:
                self._loaded = driver, driver.load(self.image)
                self._handles.clear()
            handle = self._handles.get((name, device))
            if handle is None:
                handle = driver.kernel(self._loaded[1], name)
                for attribute in self.program.attributes:
                    if attribute.kernel == name:
                        driver.set_attribute(handle, attribute.number, attribute.value, device)
                self._handles[name, device] = handle
        return handle
