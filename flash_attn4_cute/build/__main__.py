"""Command line of the build: `python -m flash_attn4_cute.build`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .assemble import assemble, stage
from .recipe import Recipe

REPOSITORY = Path(__file__).resolve().parents[2]


def main() -> None:
    """Assemble every variant, or with --stage only the tree that kernel-builder builds from."""
    parser = argparse.ArgumentParser(prog="python -m flash_attn4_cute.build", description=__doc__)
    parser.add_argument("--root", type=Path, default=REPOSITORY, help="the repository")
    parser.add_argument("--output", type=Path, help="where the variants go (default: ROOT/build)")
    parser.add_argument("--stage", type=Path, help="lay out kernel-builder's source tree here")
    arguments = parser.parse_args()

    recipe = Recipe.read(arguments.root)
    if arguments.stage is not None:
        stage(recipe, arguments.stage)
        return
    for variant in assemble(recipe, arguments.output or arguments.root / "build"):
        print(f"{variant.path}: {variant.id}, {variant.num_files} files, digest valid")


if __name__ == "__main__":
    main()
