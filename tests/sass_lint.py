"""Find arrivals that may overtake what they answer for, in machine code.

A warp that has read a slot of shared memory with `ldmatrix` arrives at the slot's barrier. In PTX
the arrival comes later; in machine code a load is over only where a later instruction waits for its
scoreboard, and ptxas has put arrivals in front of that. Then the slot may be filled again before it
was read (an H200 did it). An instruction's control bits name the scoreboard that its result
counts, and those it waits for:

    bits 105-108 stall   109 yield   110-112 scoreboard of the result, 7: none   116-121 waits for

Loads come back in order: one without a scoreboard of its own is over with the next that has one.
"""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .cuda_tools import find_tool

NO_SCOREBOARD = 7
CODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;\s+/\* 0x[0-9a-f]{16} \*/")
SECOND_WORD = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")
LABEL = re.compile(r"^\s*(\.L_\w+):")
BRANCH = re.compile(r"\bBRA\b.*`\((\.L_\w+)\)")
ARRIVAL = re.compile(r"\bSYNCS\.ARRIVE\.TRANS64\.A[R1]T0\b")


@dataclass(frozen=True)
class Instruction:
    """One instruction, the scoreboard it counts its result on and the mask of those it awaits."""

    text: str
    scoreboard: int
    waits: int


def disassemble(cubin: Path) -> str:
    command = [find_tool("nvdisasm"), "-c", "-hex", str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(listing: str) -> tuple[list[Instruction], list[range]]:
    """The instructions of a listing of `nvdisasm -hex`, and the loops that branches back close."""
    found, loops, labels, text = [], [], {}, ""
    for line in listing.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(found)
        elif code := CODE.search(line):
            text = code[1]
        elif text and (word := SECOND_WORD.match(line)):
            if (branch := BRANCH.search(text)) and branch[1] in labels:
                loops.append(range(labels[branch[1]], len(found) + 1))
            control = int(word[1], 16) >> 41
            found.append(Instruction(text, control >> 5 & 7, control >> 11 & 63))
            text = ""
    return found, loops


def hasty_arrivals(listing: str) -> list[str]:
    """Each arrival before which an `ldmatrix` was issued that nobody has waited for.

    An arrival in a loop answers for no load in front of the loop: those are queries.
    """
    code, loops = instructions(listing)
    hasty: list[str] = []
    pending: dict[int, int | None] = {}  # position of a load -> its scoreboard, if it has one
    for at, this in enumerate(code):
        pending = {
            load: own for load, own in pending.items() if own is None or not this.waits >> own & 1
        }
        if "LDSM" in this.text:
            own = None if this.scoreboard == NO_SCOREBOARD else this.scoreboard
            if own is not None:
                pending = {load: own if was is None else was for load, was in pending.items()}
            pending[at] = own
        if ARRIVAL.search(this.text):
            around = [loop for loop in loops if at in loop]
            if any(all(load in loop for loop in around) for load in pending):
                hasty.append(this.text)
    return hasty
