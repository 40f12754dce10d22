"""Run as a process of its own (`pytest tests/emulator`): CuTe DSL loads its runtime only once."""

import ptx_emulator

ptx_emulator.bootstrap()
