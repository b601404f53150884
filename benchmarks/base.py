"""Another commit as one more contender: built apart, run in a process of its own, timed in turn.

Two packages named fakd_kernels do not mix in one process. The other one is fed by the same bench
module, of this tree, and computes a step whenever a line arrives.
"""

import importlib
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What waits for work in one process must not take a core from the other: OpenMP's threads spin for
# some milliseconds after a step.
REST_SECONDS = 0.02


def build(reference: str, folder: Path) -> Path:
    """The packages of a commit with their extension, without its benchmarks and tests.

    Raises:
        SystemExit: no such commit.
    """
    packed = folder / "tree.tar"
    names = ["fakd_kernels", "fakd", "csrc", "setup.py", "build_backend.py", "pyproject.toml"]
    command = ["git", "archive", "-o", packed, reference, *names, "README.md", "LICENSE"]
    if subprocess.run(command, cwd=ROOT).returncode != 0:
        raise SystemExit(f"--base must be a commit of this repository: got {reference!r}.")
    tree = folder / "tree"
    with tarfile.open(packed) as archive:
        archive.extractall(tree, filter="data")
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, check=True, cwd=tree)
    return tree


class RemoteStep:
    """A step of a built tree; calling it computes it there."""

    def __init__(self, tree: Path, *case: str) -> None:
        # The tree is the working folder, which comes first on the path, before this repository.
        program = "from benchmarks.base import serve; serve()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", program, *case],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=tree,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )

    def __enter__(self) -> "RemoteStep":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def time_ms(self) -> float:
        time.sleep(REST_SECONDS)
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the other commit must compute the step: its words stand above.")
        time.sleep(REST_SECONDS)
        return float(answer)

    __call__ = time_ms


def serve() -> None:
    """In the other process: time a step for every line."""
    from . import harness

    module, *case = sys.argv[1:]
    step = harness.make_step(importlib.import_module(module), *case)
    for _ in sys.stdin:
        sys.stdout.write(f"{harness.time_ms(step)}\n")
        sys.stdout.flush()
