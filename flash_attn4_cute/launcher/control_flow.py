"""The blocks of a function in MLIR's LLVM dialect, and where branches meet again."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_LABEL = re.compile(r"\^(bb\d+)(?:\((.*)\))?:")


@dataclass(slots=True)
class Block:
    """Operations in order; `last` hands over to other blocks. The first block is called ""."""

    arguments: list[str]
    body: list[str] = field(default_factory=list)
    last: str = ""

    @property
    def next(self) -> list[str]:
        """The blocks that may follow."""
        return re.findall(r"\^(bb\d+)", self.last)


def split_blocks(function: str) -> dict[str, Block]:
    """The blocks of the text of a function, without its first and last line."""
    current = Block([])
    blocks = {"": current}
    for line in (line.strip() for line in function.splitlines()[1:-1]):
        label = _LABEL.match(line)
        if label is not None:
            current = Block(re.findall(r"%\w+", label.group(2) or ""))
            blocks[label.group(1)] = current
        elif line.startswith(("br ", "cond_br ", "return", "unreachable")):
            current.last = line
        elif line:
            current.body.append(line)
    return blocks


def exit_of(blocks: dict[str, Block], starts: list[str]) -> str:
    """The first block that every way from `starts` to the end of the function passes."""
    after = {name: set(blocks) for name in blocks}
    changed = True
    while changed:
        changed = False
        for name, block in blocks.items():
            common = set.intersection(*(after[n] for n in block.next)) if block.next else set()
            if common | {name} != after[name]:
                after[name], changed = common | {name}, True
    shared = set.intersection(*(after[start] for start in starts))
    # Of the blocks that all ways pass, the first is passed before all others.
    return max(shared, key=lambda name: len(after[name]))
