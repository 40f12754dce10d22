"""Runs programs in the emulator; the counterpart of card.py."""

import numpy as np

import ptx_emulator
from ptx_emulator.launch.host import Launch

from .programs import ARCH, Program
from .tensormap import encode


def aligned(words: np.ndarray) -> np.ndarray:
    """A copy at an address that is a multiple of 256, as an allocation on a card is."""
    room = np.zeros(max(16, words.nbytes) + 256, np.uint8)
    start = -room.ctypes.data % 256
    copy = room[start : start + words.nbytes].view(np.uint32)
    copy[:] = words
    return copy


def run(
    program: Program, schedule: int = 0, hardware_sums: bool = True
) -> tuple[np.ndarray, bytes]:
    """What the program leaves in `target`, and its tensor map."""
    source, target = aligned(program.source), aligned(program.empty_target())
    addresses = [x.ctypes.data for x in (source, target)]
    map_ = bytes(128)
    if program.map is not None:
        map_ = encode(program.map, addresses[program.map.over_target])
    launch = Launch(
        kernel="program",
        ptx=program.ptx,
        grid=(program.blocks, 1, 1),
        block=(program.threads, 1, 1),
        cluster=(program.cluster, 1, 1),
        dynamic_smem=program.smem,
        static_smem=0,
        stream=0,
        params=(*(a.to_bytes(8, "little") for a in addresses), map_),
        attributes=(),
    )
    with ptx_emulator.session(ARCH, schedule=schedule, hardware_sums=hardware_sums) as emulator:
        for words in (source, target):
            emulator.allocations.add(words.ctypes.data, words.nbytes, words)
        emulator.launch(launch)
    return target.copy(), map_
