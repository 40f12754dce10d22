"""The timing model: its units by hand-made streams, and one kernel from recording to a launch."""

import numpy as np
import pytest

from ptx_emulator.timing import published
from ptx_emulator.timing.calibrate import Row, loss, summary
from ptx_emulator.timing.grid import Prediction, Problem, predict, shares
from ptx_emulator.timing.lower import Op, in_order
from ptx_emulator.timing.problems import Costs, Kernel, Runs
from ptx_emulator.timing.replay import Streams, Stuck, replay, table_of
from ptx_emulator.timing.table import CONSTANTS, FITTED, machine_of

MACHINE = machine_of("sm_100a")
FMA = Op("plain", "fma", MACHINE["fma"], MACHINE["alu_latency"])
EX2 = Op("plain", "mufu", MACHINE["mufu"], MACHINE["mufu_latency"])
ROWS, COLUMNS, DEPTH = 128, 128, 16  # of one tcgen05.mma


def with_registers(op: Op, reads: tuple[int, ...], writes: tuple[int, ...]) -> Op:
    return Op(op.kind, op.pipe, op.cycles, op.latency, op.slots, op.amount, reads, writes)


def streams(
    warps: list[list[tuple[Op, list[tuple[int, int]]]]],
    numbers: list[int],
    barriers: tuple[int, ...] = (1,),
) -> Streams:
    """One CTA: for each warp its number and its (op, names)."""
    code = [op for warp in warps for op, _ in warp]
    ops, registers = table_of(code)
    counts = [len(names) for warp in warps for _, names in warp]
    pairs = [pair for warp in warps for _, names in warp for pair in names]
    return Streams(
        arch="sm_100a",
        ops=ops,
        registers=registers,
        num_registers=64,
        code=np.arange(len(code), dtype=np.int32),
        warp_start=np.cumsum([0, *map(len, warps)]).astype(np.int64),
        warp_cta=np.zeros(len(warps), np.int32),
        warp_number=np.array(numbers, np.int32),
        names_start=np.cumsum([0, *counts]).astype(np.int64),
        names=np.array(pairs or [(0, 0)], np.int32),
        barrier_counts=np.array(barriers, np.int32),
        cluster=1,
        ctas=[(0, 0, 0)],
        lines=[(0, op.kind, op.pipe) for op in code],
    )


def plain(op: Op, number: int) -> list[tuple[Op, list[tuple[int, int]]]]:
    return [(op, [])] * number


def test_independent_instructions_issue_one_a_cycle():
    assert replay(streams([plain(FMA, 100)], [0]), MACHINE).cycles == pytest.approx(100, abs=2)


def test_dependent_instructions_wait_for_each_other():
    chained = with_registers(FMA, (1,), (1,))
    cycles = replay(streams([plain(chained, 100)], [0]), MACHINE).cycles
    assert cycles == pytest.approx(100 * (MACHINE["fma"] + MACHINE["alu_latency"]), rel=0.02)


@pytest.mark.parametrize(("numbers", "schedulers"), [((0, 4), 1), ((0, 1), 2)])
def test_warps_share_the_pipes_of_their_scheduler(numbers, schedulers):
    found = replay(streams([plain(EX2, 50)] * 2, list(numbers)), MACHINE)
    expected = 2 * 50 * MACHINE["mufu"] / schedulers
    assert found.cycles == pytest.approx(expected, rel=0.1)


def test_products_take_the_tensor_cores_rate():
    product = Op("product", "lsu", 2, 0)
    warp = [(product, [(ROWS, COLUMNS), (1, 0)])] * 32
    found = replay(streams([warp], [0]), MACHINE, traced=True)
    expected = 2 * ROWS * COLUMNS * DEPTH / MACHINE["tensor_flops"]
    assert [end - start for _, _, start, end in found.units] == [expected] * 32


def test_a_wait_ends_with_the_phase():
    work, arrive = plain(FMA, 300), [(Op("arrive"), [(0, 1)])]
    wait = [(Op("wait", blocking=True), [(0, 0)])]
    cycles = replay(streams([work + arrive, wait], [0, 1]), MACHINE).warp_end
    latency = MACHINE["arrive_latency"] + MACHINE["sync_latency"]
    assert cycles[1] == pytest.approx(300 + latency, abs=5)


def test_a_wait_for_nothing_is_stuck():
    wait = [(Op("wait", blocking=True), [(0, 0)])]
    with pytest.raises(Stuck, match="warp 3: wait"):
        replay(streams([wait], [3]), MACHINE)


def test_copies_of_a_cta_have_their_own_barriers():
    work, arrive = plain(FMA, 50), [(Op("arrive"), [(0, 1)])]
    wait = [(Op("wait", blocking=True), [(0, 0)])]
    twice = streams([work + arrive, wait], [0, 1]).times(2)
    assert twice.names[:, 0].tolist() == [0, 0, 1, 1]
    found = replay(twice, MACHINE, sms=[0, 0])
    assert found.busy[0].sum() > 0 and (found.warp_end > 0).all()


def test_the_order_keeps_dependencies_and_hides_latency():
    first = with_registers(EX2, (0,), (1,))
    use = with_registers(FMA, (1,), (2,))
    other = with_registers(FMA, (3,), (4,))
    assert in_order([first, use, other]) == [first, other, use]


def test_each_constant_has_a_source_and_a_few_are_fitted():
    assert all(source for *_, source in CONSTANTS.values())
    assert 0 < sum(source == FITTED for *_, source in CONSTANTS.values()) <= 6


def test_half_of_the_published_points_are_held_out():
    points = published.points("sm_100a")
    assert len(points) == 18 and sum(fitted for *_, fitted in points) == 9
    assert not any(fitted for *_, fitted in published.points("sm_103a"))
    problem = points[0][1]
    # 0.39 ms at 703 TFLOP/s, as the thread has it
    assert problem.flops / 703e12 == pytest.approx(0.39e-3, rel=0.01)


def runs(persistent: bool) -> Runs:
    return Runs(Kernel("ours", "sm_100a", 64, 64, False), 256, 1, 1, persistent, [])


def test_waves_round_up_to_the_busiest_sm():
    problem = Problem(1, 256 * 150, 1, 1, 64, 64, False)  # 150 tiles on 148 SMs: two waves
    costs = Costs(start=1000, tile=500, block=100)
    each = 500 + 300 * 100
    clock = 1000 * MACHINE["clock_ghz"]
    once = predict(problem, runs(True), costs, MACHINE)
    assert once.us == pytest.approx(MACHINE["launch_us"] + (1000 + 2 * each) / clock)
    every = predict(problem, runs(False), costs, MACHINE)
    assert every.us == pytest.approx(MACHINE["launch_us"] + 2 * (1000 + each) / clock)


def test_fixed_shares_go_forwards_and_backwards_in_turn():
    assert shares([7, 6, 5, 4, 3, 2], 2) == [7 + 4 + 3, 6 + 5 + 2]
    assert shares([7, 6, 5, 4, 3], 3) == [7, 6 + 3, 5 + 4]


def test_errors_are_summed_up_as_shares():
    kernel, problem = Kernel("ours", "sm_100a", 64, 64, False), Problem(1, 1, 1, 1, 64, 64, False)
    rows = [Row(kernel, problem, 100, True, Prediction(1, x, 1, 1)) for x in (90, 100, 130)]
    assert summary(rows) == {"median": pytest.approx(0.1), "worst": pytest.approx(0.3), "points": 3}
    assert loss(rows[1:2]) == 0


def test_our_kernel_from_recording_to_cycles():
    from ptx_emulator.timing.problems import BLOCK, record
    from ptx_emulator.timing.record import listening
    from ptx_emulator.timing.replay import TENSOR_UNIT, streams_of

    d, queries, keys = 64, 256, 384
    with listening():
        recording = record(Kernel("ours", "sm_100a", d, d, False), queries, keys, 1)
    found = replay(streams_of(recording, MACHINE), MACHINE, traced=True)
    shapes = [end - start for unit, _, start, end in found.units if unit == TENSOR_UNIT]
    tiles = queries // BLOCK * keys // BLOCK
    assert len(shapes) == tiles * (d + BLOCK) // DEPTH
    flops = 4 * queries * keys * d
    assert sum(shapes) >= flops / MACHINE["tensor_flops"]
    # No unit is faster than it can be, and the tile is not many times its bound.
    exponentials = 0.7 * queries * keys / (32 / MACHINE["mufu"] * 4)
    assert exponentials < found.cycles < 12 * exponentials
