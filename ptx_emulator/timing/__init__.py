"""How long a kernel would take: a timing model over the instruction streams of the emulator.

    record.py   what each warp of a few CTAs issued, and on which barriers it waited
    lower.py    PTX to what a scheduler issues: pipe, cycles, latency, registers
    table.py    the machines: one table of constants, each with its source
    replay.cpp  schedulers, pipes, memories and barriers, event by event
    grid.py     from the CTAs that were replayed to the launch of a whole problem

docs/timing.md says what was predicted, against what it was held and how far it was off.
"""
