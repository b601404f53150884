"""Peak memory of a step beyond what is held before it."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

from .device import is_cuda, synchronize


def extra_peak_mb(step: Callable[[], object]) -> float:
    """Of the second call, in MB; in a fresh process, for what ran before leaves memory to reuse."""
    step()  # libraries load, threads start, compilers compile
    if is_cuda():
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status_mb("VmRSS")
    step()
    return _status_mb("VmHWM") - before


def _status_mb(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(
        f"/proc/self/status must hold {name}: peak memory is measured on Linux only."
    )
