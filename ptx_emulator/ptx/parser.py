"""PTX text -> Kernel.

Scopes ({ … }) may declare registers and labels of their own; both get unique names here, so what
follows sees one flat kernel.
"""

import math
import re

from ..words import words
from .syntax import (
    Address,
    Imm,
    Instruction,
    Kernel,
    Not,
    Operand,
    Pair,
    Param,
    Reg,
    Special,
    Symbol,
    Variable,
    Vector,
)

REGISTERS_PER_SM = 65536
SIZES = {"8": 1, "16": 2, "32": 4, "64": 8, "128": 16}
SPECIALS = frozenset(
    words(
        "tid ntid ctaid nctaid laneid warpid nwarpid smid nsmid gridid clock clock64 "
        "globaltimer clusterid nclusterid cluster_ctaid cluster_nctaid cluster_ctarank "
        "cluster_nctarank is_explicit_cluster lanemask_eq lanemask_le lanemask_lt "
        "lanemask_ge lanemask_gt dynamic_smem_size total_smem_size aggr_smem_size "
        "globaltimer_lo globaltimer_hi clock_hi reserved_smem_offset_begin "
        "reserved_smem_offset_end"
    )
)
_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.S)
_LABEL = re.compile(r"\s*([\w$%.]+)\s*:(?!:)")
_PARAM = re.compile(
    r"\.param\s+(?:\.align\s+\d+\s+)?\.\w*?(\d+)\s+(?:[^,\s]+\s+)*?([\w$]+)(?:\[(\d+)\])?\s*$"
)
_VARIABLE = re.compile(
    r"(?:\.\w+\s+)*?\.(shared|global|const|local)\s+(?:\.align\s+(\d+)\s+)?\.\w*?(\d+)\s+"
    r"([\w$]+)(?:\[(\d*)\])?\s*(?:=\s*(.*))?$",
    re.S,
)


class PtxError(Exception):
    """The text is not PTX as the emulator knows it."""


class _Scope:
    def __init__(self, parent: "_Scope | None", tag: str) -> None:
        self.parent = parent
        self.tag = tag
        self.registers: dict[str, Reg] = {}
        self.ranges: dict[str, tuple[int, str]] = {}
        self.labels: dict[str, str] = {}


def parse(text: str) -> dict[str, Kernel]:
    """All kernels of a PTX module by entry name."""
    text = _COMMENT.sub(lambda match: "\n" * match.group().count("\n"), text)
    target = re.search(r"\.target\s+(\w+)", text)
    kernels = {}
    first = re.search(r"\.visible\s+\.entry|\.entry|\.func", text)
    header = text[: first.start()] if first else text
    shared = [v for v in map(_variable, header.split(";")) if v]
    for match in re.finditer(r"\.entry\s+([\w$]+)\s*(\(.*?\))?([^{]*)\{", text, re.S):
        start, stop = match.end(), _closing(text, match.end())
        kernel = Kernel(match.group(1), target.group(1) if target else "")
        kernel.params = _params(match.group(2) or "")
        cluster = re.search(r"\.reqnctapercluster\s+([\d, ]+)", match.group(3))
        if cluster:
            kernel.required_cluster = tuple(int(x) for x in cluster.group(1).split(","))
        kernel.max_registers = _register_limit(match.group(3))
        kernel.variables = list(shared)
        _Body(kernel, text[start:stop], text.count("\n", 0, start) + 1).parse()
        kernels[kernel.name] = kernel
    return kernels


def _register_limit(directives: str) -> int:
    """Registers a thread that ptxas may use so that the CTAs asked for fit an SM; 0: unknown."""
    given = re.search(r"\.maxnreg\s+(\d+)", directives)
    if given:
        return int(given.group(1))
    shape = re.search(r"\.(?:reqntid|maxntid)\s+([\d, ]+)", directives)
    if not shape:
        return 0
    threads = math.prod(int(x) for x in shape.group(1).split(","))
    ctas = re.search(r"\.minnctapersm\s+(\d+)", directives)
    return REGISTERS_PER_SM // (threads * int(ctas.group(1) if ctas else 1)) // 8 * 8


def _closing(text: str, start: int) -> int:
    depth = 1
    for match in re.finditer(r"[{}]", text[start:]):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return start + match.start()
    raise PtxError("a kernel's body has no closing brace")


def _params(text: str) -> list[Param]:
    params = []
    for part in text.strip("() \n\t").split(","):
        match = _PARAM.search(part.strip())
        if match:
            bits, name, count = match.groups()
            params.append(Param(name, int(bits) // 8 * int(count or 1)))
        elif part.strip():
            raise PtxError(f"parameter not understood: {part.strip()}")
    return params


def _variable(text: str) -> Variable | None:
    match = _VARIABLE.search(text.strip())
    if not match:
        return None
    space, align, bits, name, count, initial = match.groups()
    element = int(bits) // 8
    size = element * (int(count) if count else 0 if count == "" else 1)
    data = b""
    if initial:
        values = [int(v, 0) for v in re.findall(r"-?(?:0x[0-9a-fA-F]+|\d+)", initial)]
        data = b"".join((v & (1 << 8 * element) - 1).to_bytes(element, "little") for v in values)
    return Variable(name, space, int(align or element), size, data)


class _Body:
    """Parses the statements of one kernel."""

    def __init__(self, kernel: Kernel, text: str, first_line: int) -> None:
        self.kernel = kernel
        self.text = text
        self.line = first_line
        self.scope = _Scope(None, "")
        self.num_scopes = 0
        self.pending: list[tuple[Instruction, _Scope]] = []

    def parse(self) -> None:
        at = 0
        while True:
            while at < len(self.text) and self.text[at].isspace():
                self.line += self.text[at] == "\n"
                at += 1
            if at == len(self.text):
                break
            if self.text[at] == "{":
                self.num_scopes += 1
                self.scope = _Scope(self.scope, f"@{self.num_scopes}")
                at += 1
            elif self.text[at] == "}":
                assert self.scope.parent is not None
                self.scope = self.scope.parent
                at += 1
            elif label := _LABEL.match(self.text, at):
                self._label(label.group(1))
                at = label.end()
            else:
                stop = self.text.index(";", at)
                self._statement(self.text[at:stop].strip())
                self.line += self.text.count("\n", at, stop)
                at = stop + 1
        for instruction, scope in self.pending:
            self._resolve_target(instruction, scope)

    def _label(self, name: str) -> None:
        unique = name + self.scope.tag
        self.scope.labels[name] = unique
        self.kernel.labels[unique] = len(self.kernel.code)

    def _statement(self, text: str) -> None:
        if text.startswith(".reg"):
            self._declare(text)
        elif text.startswith(".branchtargets"):
            names = [name.strip() for name in text[len(".branchtargets") :].split(",")]
            label = list(self.kernel.labels)[-1]
            self.kernel.branch_targets[label] = names
        elif text.split()[0] in (".loc", ".pragma", ".file"):
            return
        elif text.startswith("."):
            variable = _variable(text)
            if variable is None:
                raise PtxError(f"line {self.line}: directive not understood: {text}")
            self.kernel.variables.append(variable)
        elif text:
            self._instruction(text)

    def _declare(self, text: str) -> None:
        _, kind, names = text.split(None, 2)
        for name in names.split(","):
            name = name.strip()
            ranged = re.fullmatch(r"(\S+?)<(\d+)>", name)
            if ranged:
                self.scope.ranges[ranged.group(1)] = (int(ranged.group(2)), kind[1:])
            else:
                self.scope.registers[name] = self._new(name, kind[1:])

    def _new(self, name: str, kind: str) -> Reg:
        reg = Reg(len(self.kernel.registers), name, kind)
        self.kernel.registers.append(reg)
        return reg

    def _register(self, name: str) -> Reg | None:
        scope: _Scope | None = self.scope
        numbered = re.fullmatch(r"(.*?)(\d+)", name)
        while scope is not None:
            if name in scope.registers:
                return scope.registers[name]
            if numbered and numbered.group(1) in scope.ranges:
                count, kind = scope.ranges[numbered.group(1)]
                if int(numbered.group(2)) < count:
                    scope.registers[name] = self._new(name + scope.tag, kind)
                    return scope.registers[name]
            scope = scope.parent
        return None

    def _instruction(self, text: str) -> None:
        text = " ".join(text.split())
        guard, negated, rest = None, False, text
        if text.startswith("@"):
            head, rest = text.split(None, 1)
            negated = head[1] == "!"
            guard = self._register(head[1 + negated :])
            if guard is None:
                raise PtxError(f"line {self.line}: unknown guard in: {text}")
        head, _, tail = rest.partition(" ")
        opcode, *mods = head.split(".")
        is_branch = opcode in ("bra", "brx")
        operands = tuple(
            Symbol(part) if is_branch and index == 0 and opcode == "bra" else self._operand(part)
            for index, part in enumerate(_split(tail))
        )
        instruction = Instruction(opcode, tuple(mods), operands, guard, negated, self.line, text)
        if is_branch:
            self.pending.append((instruction, self.scope))
        self.kernel.code.append(instruction)

    def _resolve_target(self, instruction: Instruction, scope: _Scope) -> None:
        """Replace the label of a branch by its unique name."""
        if instruction.opcode == "brx":
            return
        symbol = instruction.operands[0]
        assert isinstance(symbol, Symbol)
        search: _Scope | None = scope
        while search is not None:
            if symbol.name in search.labels:
                instruction.operands = (Symbol(search.labels[symbol.name]),)
                return
            search = search.parent
        raise PtxError(f"line {instruction.line}: unknown label in: {instruction.text}")

    def _operand(self, text: str) -> Operand | None:
        text = text.strip()
        if text == "_":
            return None
        if text.startswith("["):
            return self._address(text[1:-1].strip())
        if text.startswith("{"):
            return Vector(tuple(self._operand(part) for part in _split(text[1:-1])))
        if "|" in text:
            first, second = text.split("|")
            return Pair(self._operand(first), self._operand(second))
        if text.startswith("!"):
            reg = self._register(text[1:].strip())
            assert reg is not None
            return Not(reg)
        return self._scalar(text)

    def _scalar(self, text: str) -> Operand:
        number = re.fullmatch(r"(-?)(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", text)
        if number:
            value = (
                int(number.group(2), 0)
                if not re.fullmatch(r"0\d+", number.group(2))
                else int(number.group(2), 8)
            )
            return Imm(-value if number.group(1) else value)
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
            return Imm(int(text[2:], 16), 32)
        if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
            return Imm(int(text[2:], 16), 64)
        reg = self._register(text)
        if reg is not None:
            return reg
        if text.startswith("%") and text[1:].split(".")[0] in SPECIALS:
            return Special(text[1:])
        return Symbol(text)

    def _address(self, text: str) -> Address:
        parts = _split(text)
        coords: tuple[Operand, ...] = ()
        if len(parts) > 1:
            vector = self._operand(parts[1])
            items = vector.items if isinstance(vector, Vector) else (vector,)
            coords = tuple(item for item in items if item is not None)
        match = re.fullmatch(r"(.+?)\s*(?:\+\s*(-?\w+))?", parts[0])
        assert match is not None
        base = self._operand(match.group(1))
        assert base is not None
        return Address(base, int(match.group(2) or "0", 0), coords)


def _split(text: str) -> list[str]:
    """Split at commas outside of brackets and braces."""
    parts, depth, start = [], 0, 0
    for at, char in enumerate(text):
        if char in "[{":
            depth += 1
        elif char in "]}":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]
