"""From a recipe to directories: the build itself."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .identity import source_id
from .recipe import KERNELS, Recipe
from .templates import COMPATIBILITY, OPS

VARIANTS = "variants"  # folder of the precompiled kernels
LIMIT = 150_000_000  # bytes of one backend's directory, all of which get_kernel downloads
# What kernel-builder reads beside torch-ext/ (CARD.md is a template, benchmarks/ are published).
STAGED = ("build.toml", "CARD.md", "LICENSE", "benchmarks")


@dataclass(frozen=True, slots=True)
class Variant:
    """One assembled directory: where it is, under which id it loads, how many files it digests."""

    path: Path
    id: str
    num_files: int
    num_bytes: int


def assemble(recipe: Recipe, output: Path, precompiled: Path | None = None) -> list[Variant]:
    """Write `output`/torch-<backend>/ for every backend of `recipe` and return them.

    `precompiled` is a folder of kernels, which the cuda backend gets as variants/.

    A directory that is already there is replaced as a whole, once its successor is complete and its
    digest validates. Raises ValueError if build.toml is not one that `kernels` accepts, or if a
    directory would be larger than a package may be.
    """
    _validate_build_toml(recipe)
    unique_id = source_id(recipe)
    return [
        _assemble_variant(recipe, output, unique_id, Part(backend, precompiled))
        for backend in recipe.backends
    ]


def stage(recipe: Recipe, destination: Path, precompiled: Path | None = None) -> None:
    """Lay out the source tree that kernel-builder expects, for the flake to build.

    kernel-builder's noarch build ships only torch-ext/<name>/, so the kernels are moved into it.
    """
    for name in STAGED:
        source = recipe.root / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, destination / name, ignore=ignore)
        elif source.is_file():
            _copy(source, destination / name)
    package = destination / "torch-ext" / recipe.python_name
    _copy_package(recipe, package)
    Part("cuda", precompiled).copy_kernels(package)


@dataclass(frozen=True, slots=True)
class Part:
    """What one backend gets besides the sources."""

    backend: str
    precompiled: Path | None

    def copy_kernels(self, package: Path) -> None:
        """Copy the precompiled kernels, which only the cuda backend has a use for."""
        if self.precompiled is not None and self.backend == "cuda":
            shutil.copytree(self.precompiled, package / VARIANTS)


def _assemble_variant(recipe: Recipe, output: Path, unique_id: str, part: Part) -> Variant:
    backend = part.backend
    variant = output / f"torch-{backend}"
    fresh = output / f".torch-{backend}.partial"
    shutil.rmtree(fresh, ignore_errors=True)
    _copy_package(recipe, fresh)
    part.copy_kernels(fresh)
    names = {"name": recipe.python_name, "unique_id": unique_id}
    _write(fresh / "_ops.py", OPS.format(**names))
    _write(fresh / recipe.python_name / "__init__.py", COMPATIBILITY.format(**names))

    kernel_id = f"_{recipe.python_name}_{backend}_{unique_id}"
    num_files = _write_metadata(fresh, _metadata(recipe, backend, kernel_id))
    num_bytes = sum(path.stat().st_size for path in fresh.rglob("*") if path.is_file())
    if num_bytes > LIMIT:
        raise ValueError(
            f"{variant} would have {num_bytes / 1e6:.1f} MB, more than the {LIMIT / 1e6:.0f} MB "
            f"that a package may have. Drop calls from {KERNELS}/build/shipped.py"
        )
    shutil.rmtree(variant, ignore_errors=True)
    fresh.rename(variant)
    return Variant(variant, kernel_id, num_files, num_bytes)


def _metadata(recipe: Recipe, backend: str, kernel_id: str) -> dict[str, Any]:
    target: dict[str, Any] = {"type": backend}
    if backend == "cuda" and recipe.cuda_capabilities:
        target["archs"] = recipe.cuda_capabilities
    return {
        "name": recipe.name,
        "id": kernel_id,
        "version": recipe.version,
        "license": recipe.license,
        "python-depends": recipe.python_depends[backend],
        "kernel-depends": [],
        "backend": target,
    }


def _write_metadata(variant: Path, metadata: dict[str, Any]) -> int:
    """Digest the finished tree into metadata.json, read it back, validate; the number of files."""
    from kernels._rust import Digest, DigestAlgorithm, Metadata

    digest = Digest.hash_variant(DigestAlgorithm.SHA256, variant)
    metadata["digest"] = {"algorithm": "sha256", "files": dict(sorted(digest.files.items()))}
    path = variant / "metadata.json"
    _write(path, json.dumps(metadata, indent=2) + "\n")

    written = Metadata.read_from_file(path).digest
    assert written is not None
    written.validate(Digest.hash_variant(written.algorithm, variant))
    return len(digest.files)


def _validate_build_toml(recipe: Recipe) -> None:
    try:
        from kernels._rust import Build
    except ImportError as error:
        raise ImportError(
            "building needs the package kernels, whose Rust API validates build.toml and digests "
            "the files. Install it with: pip install kernels"
        ) from error
    backends = {str(backend).lower() for backend in Build.open(recipe.root).general.backends}
    assert backends == set(recipe.backends)


def _copy_package(recipe: Recipe, destination: Path) -> None:
    for target, source in recipe.package_files():
        _copy(source, destination / target)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")
