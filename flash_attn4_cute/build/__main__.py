"""Command line of the build: `python -m flash_attn4_cute.build`."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import time
from pathlib import Path

from .assemble import assemble, stage
from .recipe import Recipe

REPOSITORY = Path(__file__).resolve().parents[2]


def main() -> None:
    """Assemble every variant, or with --stage only the tree that kernel-builder builds from."""
    parser = _parser()
    arguments = parser.parse_args()

    recipe = Recipe.read(arguments.root)
    precompiled = arguments.precompiled
    if precompiled is not None and not any(precompiled.glob("*/*.kernel")):
        parser.error(f"--precompiled={precompiled}: there are no kernels in it")
    if arguments.variants:
        precompiled = _precompile(arguments, parser)
    if arguments.stage is not None:
        stage(recipe, arguments.stage, precompiled)
        return
    output = arguments.output or arguments.root / "build"
    for variant in assemble(recipe, output, precompiled):
        size = f"{variant.num_bytes / 1e6:.1f} MB"
        print(f"{variant.path}: {variant.id}, {variant.num_files} files, {size}, digest valid")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m flash_attn4_cute.build", description=__doc__)
    parser.add_argument("--root", type=Path, default=REPOSITORY, help="the repository")
    parser.add_argument("--output", type=Path, help="where the variants go (default: ROOT/build)")
    parser.add_argument("--stage", type=Path, help="lay out kernel-builder's source tree here")
    kernels = parser.add_mutually_exclusive_group()
    kernels.add_argument(
        "--variants",
        metavar="TARGETS",
        help="precompile the shipped kernels: all, or some of their targets, as in sm90a,sm120f; "
        "without it the package has none",
    )
    kernels.add_argument(
        "--precompiled",
        type=Path,
        metavar="FOLDER",
        help="take the kernels that an earlier --variants left in ROOT/.cache/package-variants",
    )
    parser.add_argument("--only", metavar="REGEX", default="", help="of these, keys that match")
    parser.add_argument(
        "--jobs", type=_positive, metavar="N", default=len(os.sched_getaffinity(0)),
        help="processes that compile (default: a CPU each)",
    )  # fmt: skip
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number of at least 1")
    return int(text)


def _precompile(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> Path:
    """Compile what is asked for and lay it out; the folder."""
    from .shipped import all_keys
    from .variants import compile_all, write_variants

    keys = all_keys()
    targets = sorted({key.variant for key in keys})
    wanted = targets if arguments.variants == "all" else arguments.variants.split(",")
    if not set(wanted) <= set(targets):
        parser.error(f"--variants={arguments.variants}: the targets are {', '.join(targets)}")
    keys = [k for k in keys if k.variant in wanted and re.search(arguments.only, repr(k))]
    cache = arguments.root / ".cache" / "variants"
    start = time.monotonic()
    compiled = compile_all(keys, cache, arguments.jobs)
    seconds = time.monotonic() - start
    print(f"{len(keys)} kernels for {', '.join(wanted)}, {compiled} compiled in {seconds:.0f} s")
    destination = arguments.root / ".cache" / "package-variants"
    shutil.rmtree(destination, ignore_errors=True)
    write_variants(keys, cache, destination)
    return destination


if __name__ == "__main__":
    main()
