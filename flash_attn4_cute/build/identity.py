"""Names one state of the sources, so that two builds never share a kernel id.

The id becomes the module's name in `sys.modules` and the namespace of its torch operators.
"""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

from .recipe import Recipe

LENGTH = 7


def source_id(recipe: Recipe) -> str:
    """The unique part of a kernel id, as kernel-builder makes it.

    In a git checkout: the first digits of HEAD's tree hash, with `_dirty` appended if a tracked
    file differs from it. Elsewhere (an unpacked archive): as many digits of a SHA-256 of what is
    shipped, where kernel-builder would draw a random number.
    """
    return _git_id(recipe.root) or _content_id(recipe)


def _git_id(root: Path) -> str | None:
    try:
        top = _git(root, "rev-parse", "--show-toplevel")
        if Path(top).resolve() != root.resolve():
            return None  # the checkout of some other project that contains this directory
        tree = _git(root, "rev-parse", "HEAD^{tree}")
        changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return tree[:LENGTH] + ("_dirty" if changes else "")


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _content_id(recipe: Recipe) -> str:
    digest = hashlib.sha256((recipe.root / "build.toml").read_bytes())
    for target, source in recipe.package_files():
        digest.update(target.as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(source.read_bytes()).digest())
    return digest.hexdigest()[:LENGTH]
