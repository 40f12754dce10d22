"""The command line: `python -m ptx_emulator`. Its adapters are the only modules here that know kernels."""
