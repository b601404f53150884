"""Which of a few tiles serves a kernel best on this card: measured once, kept on disk.

A launcher asks `pick` whenever it chooses a tile. It gets the winner that `tune` measured on this
card, else the first candidate, which was chosen by counted resources. Winners stand in a file of
the user's cache folder, one per card, version of the kernels, and version of Triton.
"""

import functools
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")
_asked: dict[str, Sequence] | None = None  # while `tune` listens: kernel -> candidates
_forced: dict[str, object] = {}  # while `tune` measures


def pick(kernel: str, candidates: Sequence[T]) -> T:
    """The candidate to use; `kernel` names it with whatever its best tile may depend on."""
    if _asked is not None:
        _asked[kernel] = candidates
    if kernel in _forced:
        return _forced[kernel]
    if (winner := winners().get(kernel)) is None:
        return candidates[0]
    return next((c for c in candidates if repr(c) == winner), candidates[0])


@functools.cache
def winners() -> dict[str, str]:
    """Kernel -> its winner on this card, in words; read once, empty without a card or a file."""
    if not torch.cuda.is_available():
        return {}
    return _read(cache_path())


def tune(call: Callable[[], object], time: Callable[[Callable[[], object]], float]) -> dict:
    """Measure every candidate of the kernels of a call that have no winner yet, and keep the best.

    Kernels are tuned one after the other, each beside the winners found before. A candidate that
    asks for more than the card has is left out.

    Args:
        call: an op's forward and backward pass.
        time: how long it takes, in any unit.

    Returns:
        Kernel -> the winner in words, of those measured now.
    """
    from triton.runtime.errors import OutOfResources

    found = {}
    for kernel, candidates in _kernels_of(call).items():
        if kernel in winners() or len(candidates) < 2:
            continue
        times = {}
        for candidate in candidates:
            _forced[kernel] = candidate
            try:
                times[candidate] = time(call)
            except OutOfResources:
                continue
            finally:
                del _forced[kernel]
        if times:
            winner = min(times, key=times.get)
            winners()[kernel] = found[kernel] = repr(winner)
    if found:
        _write(cache_path(), winners())
    return found


def _kernels_of(call: Callable[[], object]) -> dict[str, Sequence]:
    global _asked
    _asked = {}
    try:
        call()
        return _asked
    finally:
        _asked = None


def cache_path() -> Path:
    import triton

    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fakd"
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no card"
    key = "\n".join((card, _kernel_version(), triton.__version__))
    return folder / f"tuning-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


@functools.cache
def _kernel_version() -> str:
    """Of what is compiled and of the lists of candidates: any change asks for new measurements."""
    here = Path(__file__).parent
    sources = [*here.glob("_triton*.py"), *here.glob("ops/*/triton_kernel/*.py")]
    texts = b"".join(path.read_bytes() for path in sorted(sources))
    return hashlib.sha256(texts).hexdigest()


def _read(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError(f"not a dictionary: {found!r}")
    except (OSError, ValueError) as error:
        words = f"{path} must hold tuned tiles: {error}; they are ignored, delete the file."
        warnings.warn(words, RuntimeWarning, stacklevel=2)
        return {}
    return found


def _write(path: Path, content: dict[str, str]) -> None:
    """In one step, so that no other process reads half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(content, file, indent=1)
    os.replace(file.name, path)
