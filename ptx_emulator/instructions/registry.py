"""The table of instruction handlers.

    @instruction("add", types="f32 f64")      by opcode and type
    @instruction("cp.async.bulk")             by opcode and leading modifiers, longest match first
    @instruction("selp")                      by opcode

A handler gets (Emitter, Instruction) and writes code; see README.md for how to add one.
"""

from collections.abc import Callable
from typing import TypeVar

from ..findings import UnknownInstruction
from ..ptx.emit import Emitter
from ..ptx.syntax import Instruction

Handler = Callable[[Emitter, Instruction], None]
F = TypeVar("F", bound=Handler)

_handlers: dict[str, Handler] = {}


def instruction(*names: str, types: str = "") -> Callable[[F], F]:
    """Register a handler for opcodes (with leading modifiers), for all types or those named."""

    def register(handler: F) -> F:
        for name in names:
            for key in [f"{name}:{kind}" for kind in types.split()] or [name]:
                assert key not in _handlers, f"{key} has two handlers"
                _handlers[key] = handler
        return handler

    return register


def handler_of(instruction: Instruction) -> Handler:
    """The handler of an instruction.

    Raises:
        UnknownInstruction: there is none; the message has the text and the line.
    """
    parts = (instruction.opcode, *instruction.mods)
    for size in range(min(len(parts), 5), 0, -1):
        name = ".".join(parts[:size])
        for key in (f"{name}:{instruction.type}", name):
            if key in _handlers:
                return _handlers[key]
    raise UnknownInstruction(f"line {instruction.line}: {instruction.text}")
