"""Measuring: checked before timed, interleaved, medians with spread, peak memory, and a record.

Each case has a fresh process, where its contenders run in turn, round by round, so that a machine
that drifts is unkind to all of them alike; a ratio is the ratio of medians of one run. Peak memory
is measured in a fresh process per contender.
"""

import datetime
import importlib
import json
import multiprocessing
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from fakd_kernels import engines

T = TypeVar("T")
Step = Callable[[], object]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# For ops whose C++ engine computes in float32 whatever it is given; a GPU has half precision.
FLOAT32_ON_CPU = tuple(DTYPES) if torch.cuda.is_available() else ("float32",)

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Goal:
    """A ratio that a row promises: contender time / `against` time, at least or at most."""

    against: str
    at_least: float | None = None  # how many times faster than `against`
    at_most: float | None = None  # how many times the time of `against`


@dataclass(frozen=True)
class Row:
    """One measured case of one op."""

    op: str
    shape: str
    dtype: str
    times_ms: dict[str, dict[str, float]]  # contender -> {"p20", "median", "p80"}
    extra_peak_mb: dict[str, float]  # contender -> MB beyond the inputs
    gflop: float  # of the necessary products
    moved_mb: float  # of the necessary reads and writes
    goals: list[Goal] = field(default_factory=list)

    def ratio(self, contender: str, against: str) -> float:
        return self.times_ms[against]["median"] / self.times_ms[contender]["median"]


def contenders() -> tuple[str, ...]:
    """The engine of this device, and what it is compared with."""
    engine = "triton" if torch.cuda.is_available() else "cpu"
    if not engines()[engine].is_usable:
        raise RuntimeError(f"engine {engine} must be usable: {engines()[engine].reason}.")
    return (engine, "eager", "compiled", "limit")


def interleave(steps: dict[str, Step], seconds: float = 8.0, least: int = 7) -> dict:
    """Median, 20th and 80th percentile of each step in ms, run in turn until time is up."""
    for step in steps.values():
        step()
        step()
    samples: dict[str, list[float]] = {name: [] for name in steps}
    deadline = time.perf_counter() + seconds
    names = list(steps)
    while time.perf_counter() < deadline or len(samples[names[0]]) < least:
        for name in names:
            _synchronize()
            begin = time.perf_counter()
            steps[name]()
            _synchronize()
            samples[name].append(1e3 * (time.perf_counter() - begin))
        names = names[1:] + names[:1]
    return {name: _spread(values) for name, values in samples.items()}


def _spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    at = lambda share: ordered[min(len(ordered) - 1, int(share * len(ordered)))]  # noqa: E731
    return {"p20": at(0.2), "median": statistics.median(ordered), "p80": at(0.8)}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def extra_peak_mb(module: str, *arguments: object) -> float:
    """Peak memory of one step beyond what its inputs hold, measured in a fresh process.

    Args:
        module: a bench module with `make_step(*arguments)`, which returns a step.
        arguments: picklable.
    """
    return in_fresh_process(_peak_of_step, module, arguments)


def in_fresh_process(function: Callable[..., T], *arguments: object) -> T:
    """The result of a call in a process of its own.

    What ran before in a process changes what its allocator does, and with it the time of
    everything that stores large intermediates: the same eager step took 157 or 356 ms. For that
    reason checks, which compute in float64, run apart from what is timed.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()


def _peak_of_step(module: str, arguments: tuple) -> float:
    step = importlib.import_module(module).make_step(*arguments)
    step()  # libraries load, threads start, compilers compile
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    import ctypes

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


def environment() -> dict:
    """What a figure depends on."""

    def git(*arguments: str) -> str:
        result = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent
        )
        return result.stdout.strip()

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "absent"
    return {
        "date": datetime.date.today().isoformat(),
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": bool(
            git("status", "--porcelain", "--", "fakd_kernels", "csrc", "benchmarks/*.py")
        ),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "command": "python -m " + " ".join(["benchmarks.run", *sys.argv[1:]]),
    }


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def save(rows: list[Row], path: Path, curves: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "environment": environment(),
        "rows": [asdict(row) for row in rows],
        "curves": curves,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
