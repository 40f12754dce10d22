"""`python -m ptx_emulator`: run a kernel in the emulator and compare it with float64."""

import sys

from .cli.main import main

sys.exit(main())
