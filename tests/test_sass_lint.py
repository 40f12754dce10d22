"""The lint of machine code says no to what went wrong on a card, and yes to what is in order."""

from .sass_lint import hasty_arrivals

# (instruction, scoreboard of its result, mask of what it waits for), of the d 64 decode kernel as
# ptxas 13.4 had made it on 2026-11-29, when an H200 filled slots that were not read yet.
WRONG = [
    ("LDSM.16.M88.4 R12, [R26]", 0, 0),
    ("LDSM.16.M88.4 R128, [R128]", 1, 0),
    ("LDSM.16.M88.4 R28, [R28]", 2, 0),
    ("LDSM.16.M88.4 R24, [R25]", 3, 0),
    ("@!P2 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR4+0x50], RZ", 7, 0),
    ("HMMA.16816.F32.BF16 R8, R124, R12.reuse, RZ", 7, 0b100001),
]


def listing(instructions: list[tuple[str, int, int]]) -> str:
    lines = []
    for n, (text, scoreboard, waits) in enumerate(instructions):
        control = (waits << 11 | 7 << 8 | scoreboard << 5) << 41
        lines.append(f"        /*{16 * n:04x}*/    {text} ;    /* 0x{0:016x} */")
        lines.append(f"    /* 0x{control:016x} */")
    return "\n".join(lines)


def test_an_arrival_in_front_of_pending_loads_is_found():
    assert hasty_arrivals(listing(WRONG)) == [WRONG[4][0]]


def test_one_scoreboard_that_nobody_waits_for_is_enough():
    waits = ("HMMA.16816.F32.BF16 R8, R124, R12, R8", 7, 0b0111)
    assert hasty_arrivals(listing([*WRONG[:4], waits, WRONG[4]])) == [WRONG[4][0]]


def test_an_arrival_behind_all_waits_is_in_order():
    waits = ("HMMA.16816.F32.BF16 R8, R124, R12, R8", 7, 0b1111)
    assert hasty_arrivals(listing([*WRONG[:4], waits, WRONG[4]])) == []


def test_a_load_without_a_scoreboard_is_over_with_the_next():
    loads = [("LDSM.16.M88.4 R12, [R26]", 7, 0), ("LDSM.16.M88.4 R28, [R28]", 2, 0)]
    waits = ("HMMA.16816.F32.BF16 R8, R124, R12, R8", 7, 0b0100)
    assert hasty_arrivals(listing([*loads, waits, WRONG[4]])) == []
    assert hasty_arrivals(listing([*loads[:1], waits, WRONG[4]])) == [WRONG[4][0]]
