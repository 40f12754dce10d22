"""Run as a process of its own (`pytest tests/emulator`): CuTe DSL loads its runtime only once."""

import os

import ptx_emulator

ptx_emulator.bootstrap()
# What lies on the disk is machine code; the emulator runs PTX of what is compiled in its process.
os.environ["FLASH_ATTN_4_CACHE"] = "0"
