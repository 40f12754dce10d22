"""Publishing: `python -m flash_attn4_cute.build.publish ORG/NAME [--execute]`.

Builds the checked-out commit anew, checks it, and lays out what the Hub repository will hold in
.cache/publish/. With --execute that folder becomes one commit on the branches v<version>, which
`get_kernel(version=)` reads, and main, which the repository's page shows.
"""

from __future__ import annotations

import argparse
import ast
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from .assemble import Variant, assemble
from .recipe import Recipe

REPOSITORY = Path(__file__).resolve().parents[2]
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class Release:
    """What would be published: a folder that is the repository's new content."""

    repo_id: str
    branches: tuple[str, ...]
    commit: str
    folder: Path
    variants: list[Variant]

    def explain(self) -> str:
        """For people, before anything is sent."""
        sizes = [path.stat().st_size for path in self.folder.rglob("*") if path.is_file()]
        lines = [
            f"repository  {self.repo_id}, of type kernel, branches {', '.join(self.branches)}",
            f"source      commit {self.commit}, clean",
            f"content     {len(sizes)} files, {sum(sizes) / 1e6:.2f} MB, in {self.folder}",
            *(f"variant     {v.path.name}: {v.id}, digest valid" for v in self.variants),
            "signature   none: kernels accepts signatures of CI identities only, made there",
        ]
        return "\n".join(lines)


def prepare(root: Path, repo_id: str) -> Release:
    """Build, check and lay out a release of the checkout `root`; nothing is sent.

    Raises:
        ValueError: a name that users could not load it by, or sources that no commit holds.
    """
    recipe = Recipe.read(root)
    _check_name(recipe, repo_id)
    commit = _clean_commit(root)
    folder = root / ".cache" / "publish" / recipe.name
    shutil.rmtree(folder, ignore_errors=True)
    variants = assemble(recipe, folder / "build")
    for cache in folder.rglob("__pycache__"):
        shutil.rmtree(cache)
    _check_variants(recipe, variants)
    shutil.copy(root / "LICENSE", folder)
    (folder / "README.md").write_text(card(recipe, repo_id), encoding="utf-8")
    return Release(repo_id, (f"v{recipe.version}", "main"), commit, folder, variants)


def execute(release: Release) -> dict[str, str]:
    """Send a release -> the new commit of each branch. Uses the token that `hf auth login` stored.

    What the branches hold beside it goes; the commits that users have pinned stay.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    repo_id = release.repo_id
    api.create_repo(repo_id, repo_type="kernel", exist_ok=True)
    commits = {}
    for branch in release.branches:
        if branch != "main":
            api.create_branch(repo_id, repo_type="kernel", branch=branch, exist_ok=True)
        commits[branch] = api.upload_folder(
            repo_id=repo_id,
            repo_type="kernel",
            folder_path=release.folder,
            revision=branch,
            delete_patterns="*",
            commit_message=f"Build of {release.commit}",
        ).oid
    return commits


def card(recipe: Recipe, repo_id: str) -> str:
    """The repository's page, from kernel-builder's template CARD.md."""
    from jinja2 import Environment, StrictUndefined

    layer = recipe.root / "torch-ext" / recipe.python_name / "__init__.py"
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    template = environment.from_string((recipe.root / "CARD.md").read_text(encoding="utf-8"))
    return template.render(
        repo_id=repo_id,
        version=recipe.version,
        license=recipe.license,
        functions=_public_names(layer),
        has_benchmark=False,
        source=None,
    )


def _public_names(file: Path) -> list[str]:
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise ValueError(f"{file} has no __all__")


def _check_name(recipe: Recipe, repo_id: str) -> None:
    if not REPO_ID.fullmatch(repo_id):
        raise ValueError(f"REPO={repo_id!r}: must be ORG/NAME. Pass REPO=org/{recipe.name}.")
    name = repo_id.split("/")[1]
    if name != recipe.name:
        raise ValueError(
            f"REPO={repo_id}: the repository must be called {recipe.name}, as in build.toml: "
            f"transformers looks for 'flash' in it, and every example names it so. "
            f"Pass REPO={repo_id.split('/')[0]}/{recipe.name}."
        )


def _clean_commit(root: Path) -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    changes = git("status", "--porcelain")
    if changes:
        raise ValueError(
            f"the checkout {root} differs from its commit:\n{changes}\n"
            f"Commit or remove these first: a release must be what its commit says."
        )
    return git("rev-parse", "HEAD")


def _check_variants(recipe: Recipe, variants: list[Variant]) -> None:
    """What `assemble` wrote, read once more as `kernels` reads it."""
    from kernels._rust import Digest, Metadata

    for variant, backend in zip(variants, recipe.backends, strict=True):
        metadata = Metadata.read_from_file(variant.path / "metadata.json")
        digest = metadata.digest
        assert digest is not None
        digest.validate(Digest.hash_variant(digest.algorithm, variant.path))
        if not re.fullmatch(rf"_{recipe.python_name}_{backend}_[0-9a-f]{{7}}", metadata.id):
            raise ValueError(f"{variant.path}: the id {metadata.id} is not that of a clean commit")


def main() -> None:
    """Show what would be published; with --execute, publish it."""
    parser = argparse.ArgumentParser(prog="make publish", description=__doc__)
    parser.add_argument("repo_id", metavar="ORG/NAME")
    parser.add_argument(
        "--execute", action="store_true", help="send it; else only say what would be"
    )
    parser.add_argument("--root", type=Path, default=REPOSITORY, help="the checkout")
    arguments = parser.parse_args()
    try:
        release = prepare(arguments.root, arguments.repo_id)
    except ValueError as error:
        sys.exit(f"publish: {error}")
    print(release.explain())
    if not arguments.execute:
        print("dry run: nothing was sent. To send it: make publish REPO=... ARGS=--execute")
        return
    for branch, commit in execute(release).items():
        print(f"published {release.repo_id}, {branch}: {commit}")


if __name__ == "__main__":
    main()
