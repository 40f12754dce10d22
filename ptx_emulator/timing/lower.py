"""PTX to what the schedulers of an SM issue, and the order in which ptxas would put it.

How PTX maps to machine instructions, as read off the SASS of the kernels that are modelled:

    mov, cvta, pack and unpack of pairs     nothing: they only name registers
    shl that one add uses                   one instruction (LEA, IMAD)
    64-bit integer arithmetic               two
    ex2 and friends without .ftz            two more, which scale denormals
    a branch                                one; the test of an mbarrier, two
    everything else                         one

Within straight-line code ptxas hides latencies by interleaving. Here arithmetic is put in the order
in which its operands and pipes would be ready, looking WINDOW instructions ahead; memory accesses,
products of whole warpgroups and synchronisation keep their order. Registers are dependencies by
their PTX names, so that what one iteration leaves for the next is known too. Registers that do not
suffice (spills) are not modelled.
"""

from dataclasses import dataclass, field

from ..counters import shared_bytes, tmem_bytes
from ..ptx.flow import Block, Flow, destinations, sources
from ..ptx.syntax import Imm, Instruction
from .record import is_dynamic
from .table import Machine

WINDOW = 8  # instructions that the order looks ahead: fitted, see docs/timing.md

# Numbers that replay.cpp shares.
PIPES = ("none", "fma", "alu", "mufu", "tensor", "lsu")
KINDS = (
    "plain", "free", "shared", "tmem_load", "tmem_store", "tmem_wait", "wait", "arrive", "expect",
    "named_sync", "named_arrive", "cluster_arrive", "cluster_wait", "load", "store", "store_commit",
    "store_wait", "product", "commit", "wgmma", "wgmma_commit", "wgmma_wait", "copy",
    "copy_commit", "copy_wait", "copy_arrive", "global",
)  # fmt: skip
KIND = {name: number for number, name in enumerate(KINDS)}
PIPE = {name: number for number, name in enumerate(PIPES)}


@dataclass(slots=True)
class Op:
    """What one instruction costs. `amount`: bytes, groups that may stay, or columns."""

    kind: str
    pipe: str = "none"
    cycles: float = 0.0  # of the pipe
    latency: float = 0.0
    slots: float = 1.0
    amount: float = 0.0
    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()
    dynamic: bool = False
    blocking: bool = False  # a wait that is a loop
    line: int = 0
    name: str = ""


_SPECIAL = frozenset({"ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh"})
_FREE = frozenset(
    {"mov", "cvta", "pragma", "prefetch", "setmaxnreg", "griddepcontrol", "nanosleep"}
)
_FLOATING = ("f32", "f16", "bf16", "f64")


def lower(ins: Instruction, machine: Machine, spins: bool) -> Op:
    """One PTX instruction."""
    op = _ordered(ins, machine, spins) or _arithmetic(ins, machine)
    op.reads = tuple({reg.index for reg in sources(ins)})
    op.writes = tuple({reg.index for reg in destinations(ins)})
    if ins.opcode == "mov" and not any(reg for reg in sources(ins)):
        op.reads = ()
    op.dynamic = is_dynamic(ins)
    op.line, op.name = ins.line, ins.opcode
    if ins.guard is not None and op.writes:  # keeps the old value where it does not hold
        op.reads = tuple({*op.reads, *op.writes})
    return op


def _arithmetic(ins: Instruction, m: Machine) -> Op:
    name, kind, alu = ins.opcode, ins.type, m["alu_latency"]
    if name in _FREE:
        return Op("free", slots=0)
    if name in _SPECIAL:
        plain = not ins.has("ftz") and kind == "f32" and name in ("ex2", "lg2", "sqrt", "rsqrt")
        return Op("plain", "mufu", m["mufu"], m["mufu_latency"], 3.0 if plain else 1.0)
    if name == "mma":
        return Op("plain", "tensor", m["mma_sync"], m["mma_sync_latency"])
    if name in ("shfl", "redux", "match"):
        return Op("plain", "lsu", m["lsu"], m["shuffle_latency"])
    if name in ("bra", "brx", "ret", "exit"):
        return Op("plain", slots=1.0)
    if kind == "f32x2":
        return Op("plain", "fma", m["fma2"], alu)
    if name in ("fma", "mul", "add", "sub") and kind.startswith(_FLOATING):
        return Op("plain", "fma", m["fma"], alu)
    if name in ("mul", "mad") or name.startswith("mad"):
        wide = 2.0 if kind.endswith("64") and not ins.has("wide") else 1.0
        return Op("plain", "fma", wide * m["imad"], alu, wide)
    if name == "cvt":
        if (
            "f32" in ins.mods
            and kind != "f32"
            or any(x.startswith(("bf16", "f16")) for x in ins.mods)
        ):
            return Op("plain", "alu", m["convert"], alu)
        return (
            Op("free", slots=0)
            if kind.endswith(("16", "64", "32"))
            else Op("plain", "alu", m["alu"], alu)
        )
    wide = 2.0 if kind.endswith("64") else 1.0
    return Op("plain", "alu", wide * m["alu"], alu, wide)


def _ordered(ins: Instruction, m: Machine, spins: bool) -> Op | None:
    """An instruction whose order counts; None for arithmetic."""
    name, has = ins.opcode, ins.has
    if name == "mbarrier":
        return _mbarrier(ins, spins)
    if name in ("bar", "barrier"):
        if has("warp"):
            return Op("plain")
        if has("cluster"):
            return Op("cluster_wait" if has("wait") else "cluster_arrive")
        return Op("named_arrive" if has("arrive") else "named_sync")
    if name == "cp":
        return _copy(ins, m)
    if name == "tcgen05":
        return _tcgen05(ins, m)
    if name == "wgmma":
        return _wgmma(ins, m)
    if name in ("ldmatrix", "stmatrix") or (
        name in ("ld", "st", "atom", "red") and shared_bytes(ins)
    ):
        return Op("shared", "lsu", m["lsu"], m["smem_latency"], amount=shared_bytes(ins))
    if name in ("ld", "st", "atom", "red"):
        if has("param") or any(x.startswith("param") for x in ins.mods):
            return Op("plain", "lsu", m["lsu"], m["smem_latency"])
        return Op("global", "lsu", m["lsu"], m["global_latency"], amount=128)
    if name in ("fence", "membar", "clusterlaunchcontrol"):
        return Op("load" if has("try_cancel") else "plain")
    return None


def _mbarrier(ins: Instruction, spins: bool) -> Op:
    if ins.has("try_wait", "test_wait"):
        return Op("wait", slots=2.0, blocking=spins)
    if ins.has("arrive"):
        return Op("expect" if ins.has("expect_tx") else "arrive")
    if ins.has("expect_tx", "complete_tx"):
        return Op("expect", amount=1)  # bytes and no arrival
    return Op("plain")


def _number(ins: Instruction) -> float:
    return next((float(o.value) for o in ins.operands if isinstance(o, Imm)), 0.0)


def _copy(ins: Instruction, m: Machine) -> Op:
    bulk = ins.has("bulk")
    if ins.has("commit_group"):
        return Op("store_commit" if bulk else "copy_commit")
    if ins.has("wait_group", "wait_all"):
        return Op("store_wait" if bulk else "copy_wait", amount=_number(ins))
    if not bulk:
        if ins.has("mbarrier"):
            return Op("copy_arrive")
        return Op("copy", "lsu", 2 * m["lsu"], amount=shared_bytes(ins))
    spaces = [x for x in ins.mods if x.startswith(("shared", "global"))]
    return Op("store" if spaces[0].startswith("global") else "load", "lsu", m["lsu"])


def _tcgen05(ins: Instruction, m: Machine) -> Op:
    if ins.has("mma"):
        return Op("product", "lsu", m["lsu"])
    if ins.has("commit"):
        return Op("commit")
    if ins.mods[0] == "ld":
        return Op("tmem_load", "lsu", m["lsu"], m["tmem_latency"], amount=tmem_bytes(ins))
    if ins.mods[0] == "st":
        return Op("tmem_store", "lsu", m["lsu"], m["tmem_latency"], amount=tmem_bytes(ins))
    if ins.mods[0] in ("wait::ld", "wait::st"):
        return Op("tmem_wait", amount=ins.mods[0] == "wait::ld")
    return Op("plain")


def _wgmma(ins: Instruction, m: Machine) -> Op:
    if ins.has("mma_async"):
        columns, deep = (int(x) for x in ins.mods[3][4:].split("k"))
        cycles = 2 * 64 * columns * deep / m["tensor_flops"]
        return Op("wgmma", "tensor", cycles, m["wgmma_latency"], amount=shared_bytes(ins))
    if ins.has("commit_group"):
        return Op("wgmma_commit")
    return Op("wgmma_wait" if ins.has("wait_group") else "plain", amount=_number(ins))


@dataclass(slots=True)
class Chain:
    """Blocks that always run one after the other, as one piece of code in ptxas's order."""

    blocks: list[int]
    ops: list[Op] = field(default_factory=list)
    dynamic: list[int] = field(default_factory=list)  # which dynamic instruction, by place, each is


def chains(flow: Flow, machine: Machine) -> dict[int, Chain]:
    """All code of a kernel, by the first block of each chain."""
    before: dict[int, int] = {}
    for block in flow.blocks:
        for target in set(block.targets):
            before[target] = before.get(target, 0) + 1
    before[0] = before.get(0, 0) + 1
    follows = {}
    for block in flow.blocks:
        after = block.targets[0]
        alone = len(block.targets) == 1 and after < flow.exit and before.get(after) == 1
        if alone and not _stops(block) and not _stops(flow.blocks[after]):
            follows[block.index] = after
    inner = set(follows.values())
    found = {}
    for block in flow.blocks:
        if block.index in inner:
            continue
        chain = Chain([block.index])
        while chain.blocks[-1] in follows:
            chain.blocks.append(follows[chain.blocks[-1]])
        _fill(chain, flow, machine)
        found[block.index] = chain
    return found


def _stops(block: Block) -> bool:
    return block.spins or block.waits


def _fill(chain: Chain, flow: Flow, machine: Machine) -> None:
    ops: list[Op] = []
    for index in chain.blocks:
        block = flow.blocks[index]
        ops += [lower(ins, machine, block.spins) for ins in block.code]
        if block.branch is not None and not block.spins:
            ops.append(Op("plain", reads=(block.branch.guard.index,) if block.branch.guard else ()))
    _fuse_shifts(ops)
    place = 0
    places = {}
    for op in ops:
        if op.dynamic:
            places[id(op)] = place
            place += 1
    chain.ops = in_order(ops)
    chain.dynamic = [places.get(id(op), -1) for op in chain.ops]


def _fuse_shifts(ops: list[Op]) -> None:
    """shl that only one add uses costs nothing: the add becomes LEA or IMAD."""
    uses: dict[int, list[Op]] = {}
    for op in ops:
        for reg in op.reads:
            uses.setdefault(reg, []).append(op)
    for op in ops:
        if op.name == "shl" and len(op.writes) == 1:
            users = uses.get(op.writes[0], [])
            if len(users) == 1 and users[0].name in ("add", "or"):
                op.kind, op.pipe, op.cycles, op.latency, op.slots = "free", "none", 0, 0, 0


def in_order(ops: list[Op]) -> list[Op]:
    """The order of ptxas, as far as it is modelled: see the module's docstring."""
    waiting = list(range(len(ops)))
    ready: dict[int, float] = {}  # by register
    free: dict[str, float] = {}  # by pipe
    blockers = _blockers(ops)
    done = [False] * len(ops)
    result: list[Op] = []
    now = 0.0
    while waiting:
        best, best_time = -1, float("inf")
        for place, at in enumerate(waiting[:WINDOW]):
            if any(not done[b] for b in blockers[at]):
                continue
            op = ops[at]
            time = max([now, free.get(op.pipe, 0.0), *(ready.get(r, 0.0) for r in op.reads)])
            if op.kind == "free" or time <= now:
                best, best_time = place, now
                break
            if time < best_time:
                best, best_time = place, time
        at = waiting.pop(best)
        op = ops[at]
        done[at] = True
        result.append(op)
        if op.kind == "free":
            when = max((ready.get(r, 0.0) for r in op.reads), default=0.0)
        else:
            now = max(now, best_time)
            free[op.pipe] = now + op.cycles if op.pipe != "none" else 0.0
            when = now + op.cycles + op.latency
            now += op.slots
        for reg in op.writes:
            ready[reg] = when
    return result


def _keeps_order(op: Op) -> bool:
    return op.kind not in ("plain", "free") or op.name in ("fence", "membar")


def _blockers(ops: list[Op]) -> list[list[int]]:
    """What must come before each: who writes what it reads, reads or writes what it writes."""
    writer: dict[int, int] = {}
    readers: dict[int, list[int]] = {}
    found: list[list[int]] = []
    last = -1
    for at, op in enumerate(ops):
        before = {writer[r] for r in op.reads if r in writer}
        for reg in op.writes:
            before.update(readers.get(reg, ()))
            if reg in writer:
                before.add(writer[reg])
        if _keeps_order(op):
            if last >= 0:
                before.add(last)
            last = at
        before.discard(at)
        found.append(sorted(before))
        for reg in op.reads:
            readers.setdefault(reg, []).append(at)
        for reg in op.writes:
            writer[reg] = at
            readers[reg] = []
    return found
