"""What to build, read from build.toml, and from which files."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KERNELS = "flash_attn4_cute"
# Directories inside flash_attn4_cute/ that a user of the kernel has no need of.
NOT_SHIPPED = frozenset({"build", "__pycache__"})
# kernel-builder's own default for `pyext`.
DEFAULT_EXTENSIONS = ("py", "pyi")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The parts of build.toml that decide what is written.

    `root` is the repository; `python_depends[backend]` holds the names that `metadata.json`
    declares for that backend; `cuda_capabilities` are the capabilities that `get_kernel` admits.
    """

    root: Path
    name: str
    version: int
    license: str
    backends: tuple[str, ...]
    python_depends: dict[str, list[str]]
    cuda_capabilities: list[str]
    extensions: tuple[str, ...]

    @classmethod
    def read(cls, root: Path) -> Recipe:
        """Parse `root`/build.toml. The Rust API of `kernels` validates it when it is assembled."""
        toml: dict[str, Any] = tomllib.loads((root / "build.toml").read_text(encoding="utf-8"))
        general, noarch = toml["general"], toml["torch-noarch"]
        shared = general.get("python-depends", [])
        backends = tuple(sorted(general["backends"]))
        return cls(
            root=root,
            name=general["name"],
            version=general["version"],
            license=general["license"],
            backends=backends,
            python_depends={
                backend: [*shared, *general.get(backend, {}).get("python-depends", [])]
                for backend in backends
            },
            cuda_capabilities=noarch.get("cuda_capabilities", []),
            extensions=tuple(noarch.get("pyext", DEFAULT_EXTENSIONS)),
        )

    @property
    def python_name(self) -> str:
        """The directory under torch-ext/, and the middle of every kernel id."""
        return self.name.replace("-", "_")

    def package_files(self) -> Iterator[tuple[Path, Path]]:
        """Every shipped file as (path inside the package, path of its source), in a fixed order.

        Raises FileNotFoundError if the thin layer or the kernels are not where they should be.
        """
        layer = self.root / "torch-ext" / self.python_name
        kernels = self.root / KERNELS
        for package in (layer, kernels):
            if not (package / "__init__.py").is_file():
                raise FileNotFoundError(
                    f"{package / '__init__.py'} does not exist: build from a complete checkout"
                )
        for source in self._sources(layer):
            yield source.relative_to(layer), source
        for source in self._sources(kernels):
            yield source.relative_to(self.root), source

    def _sources(self, package: Path) -> Iterator[Path]:
        for source in sorted(package.rglob("*")):
            inside = source.relative_to(package).parts[:-1]
            shipped = source.is_file() and source.suffix.lstrip(".") in self.extensions
            if shipped and NOT_SHIPPED.isdisjoint(inside):
                yield source
