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
from collections.abc import Callable, Sequence
from typing import Any

from . import driver as drivers
from .driver import NO_CONTEXT, Driver
from .integers import signed
from .program import POINTER, Launch, Program, made_function

_ALIGN = 128  # of parameters, for descriptors among them
_FORMATS = {1: "B", 2: "H", 4: "I", 8: "Q"}  # of numbers of so many bytes
# CUlaunchConfig: grid, block, shared memory, (padding), stream, attributes, their number.
_CONFIG_SIZE, _SHARED_AT, _STREAM_AT, _ATTRIBUTES_AT = 56, 24, 32, 40
_ATTRIBUTE_SIZE = 72  # CUlaunchAttribute: number, (padding), 16 words
_WORD = (1 << 64) - 1
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
        slots, layout = kernel.evaluate(inputs), kernel.layout
        self.memory = ctypes.create_string_buffer(layout.size + _ALIGN)
        self.base = -(-ctypes.addressof(self.memory) // _ALIGN) * _ALIGN
        start = self.base - ctypes.addressof(self.memory)
        self.words = (ctypes.c_uint64 * (layout.size // 8)).from_buffer(self.memory, start)
        layout.write(self.memory, start, slots, self.base)
        self.patches, self.writes, self.derived = layout.patches(slots, inputs)
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        for launch, places in zip(kernel.program.launches, layout.launches, strict=True):
            # A grid without CTAs is nothing to do, and an error for the driver.
            if all(slots[x] for x in launch.grid):
                config, table = (_pointer(self.base + at) for at in (places.config, places.table))
                handle = _pointer(kernel.handle(launch.kernel, device))
                self.calls.append((config, handle, table, None))

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
        self.config = self.attributes + _ATTRIBUTE_SIZE * len(launch.attributes)
        self.end = -(-(self.config + _CONFIG_SIZE) // _ALIGN) * _ALIGN


class _Layout:
    """Where the launches of a kernel lie in the memory of a call, and what is written there.

    `followed` are (word, number of a pointer, slot, input of the pointer), see Program.follows.
    `write(memory, start, slots, base)` writes all of it into `memory` from `start`, which is the
    address `base`.
    """

    def __init__(self, program: Program, pointer_numbers: dict[int, int]):
        self.launches: list[_Places] = []
        self.size = 0
        self._pointer_numbers = pointer_numbers
        self.followed: list[tuple[int, int, int, int]] = []
        follows, content = dict(program.follows), _Content()
        for launch in program.launches:
            places = _Places(launch, self.size)
            self.launches.append(places)
            self.size = places.end
            for i, (place, (_, fields)) in enumerate(
                zip(places.params, launch.params, strict=True)
            ):
                content.add(places.table + 8 * i, 8, f"base + {place}")
                for field in fields:
                    at = place + field.offset
                    content.add(at, field.size, f"slots[{int(field.slot)}]")
                    source = follows.get(field.slot)
                    if source is not None:
                        number = pointer_numbers[source]
                        self.followed.append((at // 8, number, field.slot, source))
            content.add_config(launch, places)
        self.write = content.writer()
        stream = len(pointer_numbers)
        self._streams = [((x.config + _STREAM_AT) // 8, stream, 0) for x in self.launches]
        self._patches: dict[tuple[int, ...], tuple[Patches, Writes, Writes]] = {}

    def patches(self, slots: list[int], inputs: list[int]) -> tuple[Patches, Writes, Writes]:
        """Which addresses to write where, and the same set `apart`.

        The distances, which shapes may change, hardly ever differ: calls share what follows.
        """
        distances = tuple([slots[slot] - inputs[source] for _, _, slot, source in self.followed])
        found = self._patches.get(distances)
        if found is None:
            if len(self._patches) >= _MAX_READY:
                self._patches.clear()
            followed = [
                (word, number, signed(distance & _WORD, 64))
                for (word, number, *_), distance in zip(self.followed, distances, strict=True)
            ]
            patches = (*followed, *self._streams)
            (writes,), derived = apart([patches], len(self._pointer_numbers) + 1)
            found = self._patches[distances] = patches, writes, derived
        return found


class _Content:
    """The fields of a piece of memory, each an expression."""

    def __init__(self) -> None:
        self.fields: dict[int, tuple[int, str]] = {}

    def add(self, at: int, size: int, expression: str) -> None:
        """`size` bytes at `at`."""
        self.fields[at] = size, expression

    def add_config(self, launch: Launch, places: _Places) -> None:
        """CUlaunchConfig and what it points to, but for the stream."""
        for i, (number, words) in enumerate(launch.attributes):
            at = places.attributes + _ATTRIBUTE_SIZE * i
            self.add(at, 4, str(int(number)))
            for j, word in enumerate(words):
                self.add(at + 8 + 4 * j, 4, str(int(word)))
        for i, at in enumerate(places.params):
            self.add(places.table + 8 * i, 8, f"base + {at}")
        for i, slot in enumerate((*launch.grid, *launch.block)):
            self.add(places.config + 4 * i, 4, f"slots[{int(slot)}]")
        self.add(places.config + _SHARED_AT, 4, str(int(launch.shared_memory)))
        self.add(places.config + _ATTRIBUTES_AT, 8, f"base + {places.attributes}")
        self.add(places.config + _ATTRIBUTES_AT + 8, 4, str(len(launch.attributes)))

    def writer(self) -> Callable[[Any, int, list[int], int], Any]:
        """The function that writes them all, see `_Layout`."""
        formats, end = ["<"], 0
        for at in sorted(self.fields):
            size, _ = self.fields[at]
            formats.append(f"{at - end}x{_FORMATS[size]}")
            end = at + size
        numbers = ", ".join(self.fields[at][1] for at in sorted(self.fields))
        pack_into = struct.Struct("".join(formats)).pack_into
        line = f"pack_into(memory, start, {numbers})"
        return made_function("memory, start, slots, base", [line], [], pack_into=pack_into)


class Kernel:
    """Machine code with a program of its launches. Called like what CuTe DSL compiles."""

    sources: tuple[str, ...] | None = None  # where its pointers come from, see `repeat`
    ptx: str | None = None  # what the machine code was made of, where it was compiled

    def __init__(self, image: bytes, program: Program):
        self.image, self.program = image, program
        pointers = [i for i, found in enumerate(program.inputs) if found.kind == POINTER]
        self.pointer_numbers = {source: n for n, source in enumerate(pointers)}
        self.pointer_inputs = [program.inputs[i] for i in pointers]
        self.layout = _Layout(program, self.pointer_numbers)
        self.read, self.evaluate = program.reader(), program.evaluator()
        self._pointers = pointers
        self._free = [i for i in pointers if i not in program.decisive]
        self._lock = threading.Lock()
        self._loaded: tuple[Driver, int] | None = None
        self._handles: dict[tuple[str, int], int] = {}
        self._ready: dict[tuple, ReadyCall] = {}

    def __call__(self, arguments: Any) -> ReadyCall:
        """Launch on PyTorch's current stream of the tensors' device; the call, to be repeated."""
        inputs = self.read((arguments,))
        ready = self.ready((arguments,), inputs)
        ready.launch([inputs[i] for i in self._pointers])
        return ready

    def ready(self, arguments: tuple, inputs: list[int] | None = None) -> ReadyCall:
        """The call with these arguments, worked out at the first one of its kind.

        `inputs` is what `read` finds in them.
        """
        inputs = self.read(arguments) if inputs is None else inputs
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
