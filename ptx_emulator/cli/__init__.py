"""The command line `python -m ptx_emulator`; only its adapters know any kernels."""
