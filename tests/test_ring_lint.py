"""The lint for frozen rings sees the bug and spares honest code. test_cubin runs it on kernels."""

import pytest

from .ptx_lint import suspects

WAIT = """
	// begin inline asm
	{{
	.reg .pred P1;
	LAB_WAIT:
	mbarrier.try_wait.parity.shared.b64 P1, [%r10], {parity}, 10000000;
	@P1 bra.uni DONE;
	bra.uni LAB_WAIT;
	DONE:
	}}
	// end inline asm
"""


def loop(label: str, body: str) -> str:
    """body in a loop."""
    return f"$L__{label}:\n{body}\n\t@%p1 bra \t$L__{label};\n"


def wait(parity: str) -> str:
    return WAIT.format(parity=parity)


FROZEN = {
    "a literal": loop("A", wait("1")),
    "a literal in a register": "\tmov.b32 \t%r20, 1;\n" + loop("A", wait("%r20")),
    "a register set in the loop": loop("A", "\tmov.b32 \t%r20, 0;\n" + wait("%r20")),
    "a copy of a literal": "\tmov.b32 \t%r19, 1;\n\tmov.b32 \t%r20, %r19;\n"
    + loop("A", wait("%r20")),
    "flipped only after the loop": "\tmov.b32 \t%r20, 1;\n"
    + loop("A", wait("%r20"))
    + "\txor.b32 \t%r20, %r20, 1;\n",
    "two loops deep": loop("A", loop("B", wait("0"))),
}

FLIPPED = loop("B", wait("%r20") + "\txor.b32 \t%r20, %r20, 1;\n")

RESTARTS = {
    "a literal": loop("A", "\tmov.b32 \t%r20, 0;\n" + FLIPPED),
    "a copy of one": "\tmov.b32 \t%r19, 0;\n" + loop("A", "\tmov.b32 \t%r20, %r19;\n" + FLIPPED),
}

HONEST = {
    "one wait before the loop": wait("0") + loop("A", "\tadd.s32 \t%r1, %r1, 1;\n"),
    "carried": "\tmov.b32 \t%r20, 0;\n" + loop("A", wait("%r20") + "\txor.b32 \t%r20, %r20, 1;\n"),
    "carried by a copy": "\tmov.b32 \t%r20, 0;\n"
    + loop("A", wait("%r20") + "\txor.b32 \t%r21, %r20, 1;\n\tmov.b32 \t%r20, %r21;\n"),
    "carried through two loops": "\tmov.b32 \t%r20, 0;\n"
    + loop("A", loop("B", wait("%r20") + "\txor.b32 \t%r20, %r20, 1;\n")),
    "computed from a counter": loop(
        "A", "\tshr.u32 \t%r5, %r4, 2;\n\tand.b32 \t%r20, %r5, 1;\n" + wait("%r20")
    ),
    "the end stands in front": "\tbra.uni \t$L__A0;\n$L__Z:\n\tret;\n$L__A0:\n"
    + "\tmov.b32 \t%r20, 0;\n"
    + loop("A", wait("%r20") + "\txor.b32 \t%r20, %r20, 1;\n")
    + "\tbra.uni \t$L__Z;\n",
    "flips in the outer loop": "\tmov.b32 \t%r20, 0;\n"
    + loop("A", loop("B", wait("%r20")) + "\txor.b32 \t%r20, %r20, 1;\n"),
    "waits on a copy": "\tmov.b32 \t%r20, 0;\n"
    + loop("A", "\tmov.b32 \t%r21, %r20;\n" + wait("%r21") + "\txor.b32 \t%r20, %r21, 1;\n"),
}


@pytest.mark.parametrize("name", FROZEN)
def test_sees_a_frozen_ring(name):
    assert [s.kind for s in suspects(FROZEN[name])] == ["frozen"]


@pytest.mark.parametrize("name", RESTARTS)
def test_sees_a_ring_that_restarts(name):
    """A producer handed to a helper in an outer loop: right at first, wrong from the second on."""
    assert [s.kind for s in suspects(RESTARTS[name])] == ["restarts"]


@pytest.mark.parametrize("name", HONEST)
def test_spares_honest_code(name):
    assert suspects(HONEST[name]) == []
