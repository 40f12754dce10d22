"""A kernel ready to run: one generated Python function per basic block, made when first reached."""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from ..check.tcgen05_wait import unawaited
from ..check.wgmma_fence import unfenced
from ..findings import Unmodelled
from ..machine.memory import RESERVED_SMEM
from .emit import DTYPES, Emitter
from .flow import Block, analyse, destinations, sources
from .parser import parse
from .syntax import Kernel

BlockFunction = Callable[..., int]


@functools.lru_cache(maxsize=64)
def load(ptx: str, kernel: str) -> "Program":
    """The program of a kernel in a PTX text, cached: kernels are launched again and again."""
    kernels = parse(ptx)
    if kernel not in kernels:
        raise KeyError(f"the PTX has no entry {kernel}; it has {', '.join(kernels)}")
    return Program(kernels[kernel])


class Program:
    """Code and layout of a kernel; it has no state of a launch."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.flow = analyse(kernel)
        self.num_registers = len(kernel.registers)
        self.dtypes = _canonical_dtypes(kernel)
        # Compilers fill don't-cares, as one half of an f32x2, with registers that nothing writes.
        # They read as all ones: NaN.
        written = {reg.index for ins in kernel.code for reg in destinations(ins)}
        self.never_written = frozenset(range(self.num_registers)) - written
        self.undefined = self._undefined_registers()
        self.namespace: dict[str, Any] = {"np": np, "ndarray": np.ndarray, **_numpy_names()}
        self.sources: dict[tuple[int, bool], str] = {}
        blocks = self.flow.blocks
        self.plain: list[BlockFunction] = [self._stub(block, False) for block in blocks]
        self.masked: list[BlockFunction] = [self._stub(block, True) for block in blocks]
        self._lay_out_variables()
        self.param_offsets: dict[str, int] = {}
        at = 0
        for param in kernel.params:
            self.param_offsets[param.name] = at
            at += -(-param.size // 128) * 128
        self.params_size = at

    @functools.cached_property
    def unfenced(self) -> dict[int, str]:
        """By line: a register that a wgmma uses without the wgmma.fence that it needs."""
        return unfenced(self.flow)

    @functools.cached_property
    def unawaited(self) -> dict[int, str]:
        """By line of a tcgen05.ld: a register that is used without the tcgen05.wait::ld."""
        return unawaited(self.flow)

    def _undefined_registers(self) -> dict[int, Any]:
        """All ones, NaN, for each register that some way through the code reads before a write."""
        blocks = self.flow.blocks
        early = blocks[0].live_in if blocks else frozenset()
        return {index: _all_ones(self.dtypes[index]) for index in early}

    def _lay_out_variables(self) -> None:
        self.shared_offsets: dict[str, int] = {}
        self.local_offsets: dict[str, int] = {}
        self.global_data: dict[str, np.ndarray] = {}
        shared, local = RESERVED_SMEM, 0
        dynamic = []
        for variable in self.kernel.variables:
            align = max(variable.align, 1)
            if variable.space == "local":
                local = -(-local // align) * align
                self.local_offsets[variable.name] = local
                local += variable.size
            elif variable.space == "shared" and variable.size:
                shared = -(-shared // align) * align
                self.shared_offsets[variable.name] = shared
                shared += variable.size
            elif variable.space == "shared":
                dynamic.append(variable)
            else:
                data = np.zeros(variable.size, np.uint8)
                data[: len(variable.data)] = np.frombuffer(variable.data, np.uint8)
                self.global_data[variable.name] = data
        for variable in dynamic:
            shared = -(-shared // variable.align) * variable.align
        for variable in dynamic:
            self.shared_offsets[variable.name] = shared
        self.dynamic_base = shared
        self.local_size = -(-local // 16) * 16

    def shared_size(self, dynamic: int) -> int:
        """End of a CTA's shared memory, reserved and static parts included."""
        return self.dynamic_base + dynamic

    def pack_params(self, params: tuple[bytes, ...]) -> np.ndarray:
        """Parameter space: each parameter at its offset, 128-byte aligned."""
        if [len(p) for p in params] != [p.size for p in self.kernel.params]:
            raise Unmodelled(
                f"the cubin's parameters have sizes {[len(p) for p in params]}, the PTX's "
                f"{[p.size for p in self.kernel.params]}"
            )
        space = np.zeros(self.params_size + 128, np.uint8)
        for param, data in zip(self.kernel.params, params, strict=True):
            at = self.param_offsets[param.name]
            space[at : at + len(data)] = np.frombuffer(data, np.uint8)
        return space

    # ---- code ----
    def _stub(self, block: Block, masked: bool) -> BlockFunction:
        def first_time(*args: Any) -> int:
            function = self.compile(block, masked)
            (self.masked if masked else self.plain)[block.index] = function
            return function(*args)

        return first_time

    def compile(self, block: Block, masked: bool) -> BlockFunction:
        """Generate and compile the function of a block."""
        from ..instructions import handler_of

        emitter = Emitter(self, block, masked)
        for instruction in block.code:
            handler = handler_of(instruction)
            emitter.begin(instruction)
            handler(emitter, instruction)
        source = emitter.finish()
        self.sources[block.index, masked] = source
        name = f"<ptx block {block.index}{' masked' if masked else ''} line {block.line}>"
        exec(compile(source, name, "exec"), self.namespace)
        return self.namespace.pop("block")

    def reached_lines(self) -> set[int]:
        """Lines of the instructions in blocks that some launch has reached so far."""
        blocks = {block for block, _ in self.sources}
        return {ins.line for block in blocks for ins in self.flow.blocks[block].code}

    def last_text(self, block: int) -> str:
        """The first instruction of a block, for messages."""
        if block >= len(self.flow.blocks):
            return ""
        code = self.flow.blocks[block].code
        return f": {code[0].text}" if code else ""


def _all_ones(dtype: str) -> Any:
    if dtype == "b1":
        return np.True_
    size = np.dtype(DTYPES[dtype]).itemsize
    return np.full(size, 255, np.uint8).view(DTYPES[dtype])[0]


def _numpy_names() -> dict[str, Any]:
    return {f"D_{name}": np.dtype(dtype).type for name, dtype in DTYPES.items()}


def _canonical_dtypes(kernel: Kernel) -> list[str]:
    """How each register is kept between blocks: by what most instructions do with it.

    Moves do not count, but tie registers together.
    """
    parent = list(range(len(kernel.registers)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    votes: list[Counter[bool]] = [Counter() for _ in parent]
    for instruction in kernel.code:
        involved = destinations(instruction) + sources(instruction)
        if instruction.opcode == "mov":
            if len(involved) == 2:
                parent[root(involved[0].index)] = root(involved[1].index)
            continue
        floating = instruction.type in ("f32", "f32x2", "f64") or instruction.opcode in (
            "mma",
            "wgmma",
        )
        for reg in involved:
            votes[reg.index][floating] += 1
    total: list[Counter[bool]] = [Counter() for _ in parent]
    for index, vote in enumerate(votes):
        total[root(index)].update(vote)
    kinds = []
    for reg in kernel.registers:
        bits = reg.type.lstrip("busf")
        if reg.type == "pred":
            kinds.append("b1")
        elif bits == "32" and total[root(reg.index)][True] > total[root(reg.index)][False]:
            kinds.append("f32")
        else:
            kinds.append({"8": "u16", "128": "b128"}.get(bits, f"u{bits}"))
    return kinds
