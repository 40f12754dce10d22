"""Assembles the package that `kernels.get_kernel` loads, without Nix.

    build.toml          --+
    torch-ext/<name>/   --+--> build/torch-<backend>/, one directory a backend
    flash_attn4_cute/   --+

`python -m flash_attn4_cute.build` writes what kernel-builder's noarch build writes: the Python
tree, `_ops.py`, `metadata.json` with a digest of every file, and the directory that old releases
of `kernels` look into. The output depends on nothing but the sources. This subpackage itself is
not shipped.
"""

from .assemble import assemble, stage
from .recipe import Recipe

__all__ = ["Recipe", "assemble", "stage"]
