"""What programs and kernels did on a card (data/), and the same in the emulator.

`python -m tests.golden.record FOLDER` runs them on a card with compute capability 9.0.
"""

from .programs import PROGRAMS, Program


def all_programs() -> dict[str, Program]:
    """Every program by its name."""
    from . import copies, elementwise, matrices, warps  # noqa: F401

    return PROGRAMS
