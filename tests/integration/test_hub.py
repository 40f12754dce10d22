"""From `make publish` to a user's call, by way of a Hub on this machine's loopback.

The real kernels, huggingface_hub and transformers run in processes of their own, since they read
where the Hub is when they are imported.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from ..conftest import ROOT
from ..hub import Hub

ORG, NAME = "some-org", "flash-attn-4"
REPO = f"{ORG}/{NAME}"
STRANGER = f"a-stranger/{NAME}"


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.invalid"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The present sources as a commit of their own."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("build.toml", "CARD.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    for name in ("torch-ext", "flash_attn4_cute"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "sources")
    return folder


@pytest.fixture(scope="module")
def hub():
    with Hub() as running:
        running.trusted.add(ORG)
        yield running


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A user's empty cache."""
    return tmp_path_factory.mktemp("home")


def run(command: list, hub: Hub, home: Path, check: bool = True, **extra: str):
    environment = {
        k: v for k, v in os.environ.items() if k not in ("LOCAL_KERNELS", "HF_HUB_OFFLINE")
    }
    environment |= {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_TOKEN": "hf_of_nobody",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(ROOT),
        "TRANSFORMERS_VERBOSITY": "error",
        **extra,
    }
    command = [str(word) for word in command]
    result = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


def python(program: str, hub: Hub, home: Path, **extra: str) -> dict:
    """What a program prints as its last line, as JSON."""
    command = [sys.executable, "-c", textwrap.dedent(program)]
    return json.loads(run(command, hub, home, **extra).stdout.splitlines()[-1])


def publish(checkout: Path, hub: Hub, home: Path, *arguments: str, check: bool = True):
    command = [sys.executable, "-m", "flash_attn4_cute.build.publish", "--root", checkout]
    return run([*command, *arguments], hub, home, check)


@pytest.fixture(scope="module")
def published(checkout, hub, home) -> str:
    """The commit that `make publish REPO=... ARGS=--execute` made of v1."""
    said = publish(checkout, hub, home, REPO, "--execute").stdout
    (sha,) = re.findall(rf"published {REPO}, v1: ([0-9a-f]{{40}})", said)
    hub.repositories[STRANGER] = hub.repositories[REPO]
    return sha


def test_dry_run_sends_nothing(checkout, hub, home):
    asked = len(hub.requests)
    said = publish(checkout, hub, home, REPO).stdout
    assert "dry run: nothing was sent" in said
    assert f"commit {git(checkout, 'rev-parse', 'HEAD')}, clean" in said
    assert len(hub.requests) == asked
    folder = checkout / ".cache" / "publish" / NAME
    assert {path.name for path in folder.iterdir()} == {"README.md", "LICENSE", "build"}
    card = (folder / "README.md").read_text()
    assert f'get_kernel("{REPO}", version=1' in card and "{" not in re.sub(r"{\w", "", card)[:200]


@pytest.mark.parametrize(
    "repo_id, message",
    [
        ("flash-attn-4", "REPO='flash-attn-4': must be ORG/NAME. Pass REPO=org/flash-attn-4"),
        ("org/attention", "REPO=org/attention: the repository must be called flash-attn-4"),
    ],
)
def test_names_that_could_not_be_loaded(checkout, hub, home, repo_id, message):
    assert message in publish(checkout, hub, home, repo_id, check=False).stderr


def test_changed_sources_are_not_published(checkout, hub, home):
    stray = checkout / "torch-ext" / "flash_attn_4" / "stray.py"
    stray.write_text("")
    try:
        result = publish(checkout, hub, home, REPO, "--execute", check=False)
    finally:
        stray.unlink()
    assert result.returncode and "differs from its commit" in result.stderr
    assert "stray.py" in result.stderr


def test_published_files(checkout, hub, published):
    files = hub.repositories[REPO].commits[published]
    folder = checkout / ".cache" / "publish" / NAME
    on_disk = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert set(files) == on_disk
    assert {path.split("/")[1] for path in files if path.startswith("build/")} == {
        "torch-cpu",
        "torch-cuda",
    }


LOADING = """
    import json
    import torch
    from kernels import get_kernel

    found = {{}}

    def attempt(name, *arguments, **keywords):
        try:
            kernel = get_kernel(*arguments, **keywords)
            q = torch.ones(1, 2, 1, 8)
            found[name] = [kernel.__file__, kernel.flash_attn_func(q, q, q).sum().item()]
        except Exception as error:
            found[name] = f"{{type(error).__name__}}: {{error}}"

    attempt("version", "{repo}", version=1)
    attempt("revision", "{repo}", revision="{sha}")
    attempt("no version", "{repo}", version=7)
    attempt("stranger", "{stranger}", version=1)
    attempt("trusted stranger", "{stranger}", version=1, trust_remote_code=True)
    attempt("listed stranger", "{stranger}", version=1, trust_remote_code=["{stranger}"])
    print(json.dumps(found))
"""


def test_get_kernel(hub, home, published):
    """By version and by a pinned revision; a publisher whom the Hub does not trust needs a yes."""
    found = python(LOADING.format(repo=REPO, stranger=STRANGER, sha=published), hub, home)
    for name in ("version", "revision", "trusted stranger", "listed stranger"):
        file, total = found[name]
        assert published in file and total == 16.0, name
    assert "not from a trusted publisher" in found["stranger"]
    assert "7" in found["no version"] and "Error" in found["no version"]


WRONG_CARD = """
    import json
    import types
    import torch

    torch.version.cuda = "13.0"
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda *_: (8, 0)
    from kernels import get_kernel

    found = {{}}
    try:
        get_kernel("{repo}", version=1)
    except Exception as error:
        found["by get_kernel"] = str(error)
    kernel = get_kernel("{repo}", version=1, check_arch=False)
    import importlib
    device = importlib.import_module(kernel.__name__ + ".flash_attn4_cute.device")
    card = types.SimpleNamespace(
        name="NVIDIA A100", major=8, minor=0, multi_processor_count=108
    )
    torch.cuda.get_device_properties = lambda *_: card
    try:
        device.supported_card(torch.device("cuda", 0))
    except NotImplementedError as error:
        found["by the kernel"] = str(error)
    print(json.dumps(found))
"""


def test_a_card_without_a_kernel(hub, home, published):
    """get_kernel refuses by the capability; where it was told not to look, the kernel refuses."""
    pytest.importorskip("cutlass", reason="the cuda variant declares it")
    found = python(WRONG_CARD.format(repo=REPO), hub, home)
    refused = found["by get_kernel"]
    assert "CUDA capability 8.0 of the current device is not supported" in refused
    for capability in ("9.0", "10.0", "10.3", "12.0", "12.1"):
        assert capability in refused and capability in found["by the kernel"]
    assert "NVIDIA A100" in found["by the kernel"]


def test_offline_after_a_snapshot(hub, published, tmp_path):
    """As docs/pinning.md has it: the whole snapshot, by the pinned commit, and then no network."""
    fetch = """
        from huggingface_hub import snapshot_download
        import json
        print(json.dumps(snapshot_download("{repo}", repo_type="kernel", revision="{sha}")))
    """
    python(fetch.format(repo=REPO, sha=published), hub, tmp_path)
    load = """
        import json
        from pathlib import Path
        from kernels import get_kernel
        from kernels._rust import Digest, DigestValidationError, Metadata
        kernel = get_kernel("{repo}", revision="{sha}", trust_remote_code=True)
        told = [kernel.describe()]
        for variant in sorted(Path(kernel.__file__).parents[1].iterdir()):
            digest = Metadata.read_from_file(variant / "metadata.json").digest
            digest.validate(Digest.hash_variant(digest.algorithm, variant))
            told.append(variant.name)
        (variant / "ops.py").unlink()
        try:
            digest.validate(Digest.hash_variant(digest.algorithm, variant))
        except DigestValidationError:
            told.append("damage found")
        print(json.dumps(told))
    """
    asked = len(hub.requests)
    said = python(load.format(repo=REPO, sha=published), hub, tmp_path, HF_HUB_OFFLINE="1")
    assert "variant cpu" in said[0]
    assert said[1:] == ["torch-cpu", "torch-cuda", "damage found"]
    assert len(hub.requests) == asked


def test_lock_file(hub, home, published, tmp_path):
    """`kernels lock` pins the commit, and a later release does not move it."""
    project = '[project]\nname = "x"\nversion = "0"\n'
    project += f'[tool.kernels.dependencies]\n"{REPO}" = 1\n'
    (tmp_path / "pyproject.toml").write_text(project)
    command = Path(sys.executable).parent / "kernels"
    run([command, "lock", tmp_path], hub, home)
    assert published in (tmp_path / "kernels.lock").read_text()

    repository = hub.repositories[REPO]
    newer = {**repository.commits[published], "README.md": b"newer"}
    repository.commit("v1", newer)
    try:
        load = """
            import json
            from pathlib import Path
            from kernels import get_locked_kernel
            kernel = get_locked_kernel("{repo}", lockfile=Path("{folder}/kernels.lock"))
            print(json.dumps(kernel.__file__))
        """
        assert published in python(load.format(repo=REPO, folder=tmp_path), hub, home)
    finally:
        repository.branches["v1"] = published


TRANSFORMERS = """
    import json
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    eager = LlamaForCausalLM(LlamaConfig(**shape, **heads, attn_implementation="eager")).eval()
    ids = torch.randint(0, 64, (2, 9))
    expected = eager(ids).logits
    eager.save_pretrained("{folder}")
    found = {{}}
    for name, consent in {asked}:
        try:
            model = LlamaForCausalLM.from_pretrained(
                "{folder}", attn_implementation=name, allow_all_kernels=consent, dtype=torch.float32
            )
            difference = (model(ids).logits - expected).abs().max().item()
            found[name] = [model.config._attn_implementation, difference]
        except Exception as error:
            found[name] = f"{{type(error).__name__}}: {{error}}"
    print(json.dumps(found))
"""


def test_transformers_from_pretrained(hub, home, published, tmp_path):
    pinned = f"{REPO}@{published}"
    asked = [(REPO, False), (pinned, False), (STRANGER, False), (f"{STRANGER}@v1", True)]
    program = TRANSFORMERS.format(folder=tmp_path / "model", asked=asked)
    found = python(program, hub, home)
    for name in (REPO, pinned, f"{STRANGER}@v1"):
        implementation, difference = found[name]
        assert implementation == name and difference < 1e-5
    assert "not from a trusted publisher" in found[STRANGER]
