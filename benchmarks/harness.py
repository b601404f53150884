"""Measuring: checked before timed, interleaved, medians with spread, and peak memory.

Each case has a fresh process, where its contenders run in turn, round by round, so that a machine
that drifts is unkind to all of them alike; a ratio is the ratio of medians of one run. Peak memory
is measured in a fresh process per contender.

A bench module declares what is measured: OP, SHAPES, TIMED (dtypes), RIVALS (contenders beside the
engines, "eager" and "limit" among them), make_inputs(shape, dtype), loss(contender, shape, inputs),
limit(shape, inputs), gflop(shape), moved_bytes(shape); where it needs to, plain_sum(shape, inputs),
rivals_of(shape), smaller(shape) to check on, limit_factor(shape), and its own make_step and check.
"""

import functools
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import torch
from torch.utils._pytree import tree_flatten, tree_map

from fakd_kernels import engines
from fakd_kernels._engines import PREFERENCE, PREFERENCE_OF
from tests.support.accuracy import assert_accurate

from . import base
from .device import device, is_cuda
from .memory import extra_peak_mb
from .processes import in_fresh_process, in_fresh_processes

T = TypeVar("T")
Step = Callable[[], object]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BOUNDS = {"limit": "limit", "sum": "plain_sum"}  # contender -> the function that makes its step
UNTIMED_MEMORY = (*BOUNDS, "not causal", "base")  # bounds, and what another process computes
# Cold caches: between two timed steps this much is written, more than any card's L2 holds.
FLUSH_BYTES = 256 << 20
# Steps may take this long, or as long as they are timed, to reach their pace.
SETTLE_SECONDS = 4.0


@dataclass(frozen=True)
class Goal:
    """A ratio that a row promises: contender time / `against` time, at least or at most."""

    against: str
    at_least: float | None = None  # how many times faster than `against`
    at_most: float | None = None  # how many times the time of `against`


@dataclass(frozen=True)
class Row:
    """One measured case of one op; the first contender is the engine that fakd chooses."""

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


@dataclass(frozen=True)
class Plan:
    """How a case is measured."""

    seconds: float = 8.0
    is_quick: bool = False  # fewer rounds of long steps; memory of fakd and eager only
    base: Path | None = None  # a built checkout of another commit, one more contender
    with_reference: bool = False  # the reference engine, one more contender


def float32_on_cpu() -> tuple[str, ...]:
    """For ops whose C++ engine computes in float32 whatever it is given."""
    return tuple(DTYPES) if is_cuda() else ("float32",)


def engines_here(op: str = "") -> tuple[str, ...]:
    """The usable engines of this device, in the order in which an op asks them."""
    preference = PREFERENCE | PREFERENCE_OF.get(op, {})
    names = [name for name in preference[device()] if name != "reference"]
    usable = tuple(name for name in names if engines()[name].is_usable)
    if not usable:
        reasons = "; ".join(engines()[name].reason for name in names)
        raise RuntimeError(f"an engine must be usable on this device: {reasons}.")
    return usable


@functools.cache
def compiled(function: Callable[..., T]) -> Callable[..., T]:
    return torch.compile(function, dynamic=False)


def shape_of(bench: ModuleType, shape):
    return bench.SHAPES[shape] if isinstance(shape, str) else shape


def make_step(bench: ModuleType, contender: str, shape, dtype: str, is_double=False) -> Step:
    """One forward and backward, returning the loss and the gradients; shape or name of a shape."""
    if hasattr(bench, "make_step"):
        return bench.make_step(contender, shape, dtype)
    shape = shape_of(bench, shape)
    inputs = bench.make_inputs(shape, DTYPES[dtype])
    if contender in BOUNDS:
        with torch.no_grad():
            return torch.no_grad()(getattr(bench, BOUNDS[contender])(shape, inputs))
    if is_double:
        inputs = tree_map(_double, inputs)
    leaves = [t for t in tree_flatten(inputs)[0] if t is not None and t.requires_grad]

    def step():
        loss = bench.loss(contender, shape, inputs)
        return loss, *torch.autograd.grad(loss, leaves)

    return step


def _double(tensor):
    if tensor is None or not tensor.is_floating_point():
        return tensor
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


def check(module: str, contender: str, shape_name: str, dtype: str) -> None:
    """No number on red: value and gradients by the accuracy rule of the tests."""
    bench = importlib.import_module(module)
    if hasattr(bench, "check"):
        return bench.check(contender, shape_name, dtype)
    shape = shape_of(bench, shape_name)
    shape = bench.smaller(shape) if hasattr(bench, "smaller") else shape
    got = make_step(bench, contender, shape, dtype)()
    eager = make_step(bench, "eager", shape, dtype)()
    truth = make_step(bench, "eager", shape, dtype, is_double=True)()
    for index, values in enumerate(zip(got, truth, eager, strict=True)):
        assert_accurate(f"result {index}", *values, torch.float32 if index == 0 else DTYPES[dtype])


def engines_of(module: str, shape_name: str, dtype: str) -> list[str]:
    """The engines that serve a case, each of them checked."""
    if hasattr(importlib.import_module(module), "make_step"):  # whose engines are chosen freely
        in_fresh_process(check, module, engines_here()[0], shape_name, dtype)
        return [engines_here()[0]]
    serving = []
    for engine in engines_here(importlib.import_module(module).OP):
        try:
            in_fresh_process(check, module, engine, shape_name, dtype)
        except RuntimeError as error:
            if "must be able to serve" not in str(error):  # what a forced engine says
                raise
            continue
        serving.append(engine)
    return serving


def measure(module: str, shape_name: str, dtype: str, plan: Plan) -> Row:
    """A checked, timed case with the peak memory of its contenders; computed in fresh processes.

    Called in the main process: only there does multiprocessing know its fork server, and a child
    that needed processes would start another server, seconds each.
    """
    bench = importlib.import_module(module)
    shape = bench.SHAPES[shape_name]
    ours = engines_of(module, shape_name, dtype)
    if plan.with_reference and not hasattr(bench, "make_step"):
        ours.append("reference")
    rivals = bench.rivals_of(shape) if hasattr(bench, "rivals_of") else bench.RIVALS
    names = [*ours, *rivals]
    times = in_fresh_process(_times_of_steps, names, module, shape_name, dtype, plan)
    if "limit" in times and hasattr(bench, "limit_factor"):
        factor = bench.limit_factor(shape)
        times["limit"] = {name: value * factor for name, value in times["limit"].items()}
    stored = [name for name in times if name not in UNTIMED_MEMORY]
    if plan.is_quick:
        stored = [ours[0], "eager"]
    peaks = extra_peaks_mb(module, [(name, shape_name, dtype) for name in stored])
    return Row(
        op=bench.OP,
        shape=shape_name,
        dtype=dtype,
        times_ms=times,
        extra_peak_mb=dict(zip(stored, peaks, strict=True)),
        gflop=bench.gflop(shape),
        moved_mb=bench.moved_bytes(shape, DTYPES[dtype].itemsize) / 1e6,
        goals=list(shape.goals) if dtype == "float32" and not is_cuda() else [],
    )


def _times_of_steps(names: list[str], module: str, shape_name: str, dtype: str, plan: Plan) -> dict:
    """Of the contenders that fit, and of another commit where the plan names one."""
    bench = importlib.import_module(module)
    steps = {name: make_step(bench, name, shape_name, dtype) for name in names}
    if is_cuda():
        steps = {name: step for name, step in steps.items() if _fits(name, step)}
    least = 3 if plan.is_quick else 5
    if plan.base is None:
        return interleave(steps, plan.seconds, least)
    with base.RemoteStep(plan.base, module, names[0], shape_name, dtype) as remote:
        return interleave(steps | {"base": remote}, plan.seconds, least)


def _fits(name: str, step: Step) -> bool:
    """Whether a contender runs on this card."""
    try:
        step()
    except (torch.OutOfMemoryError, torch._dynamo.exc.TorchDynamoException) as error:
        sys.stderr.write(f"{name} is left out: {error}\n")
        return False
    return True


def time_ms(step: Step) -> float:
    """Of one call, in the process that computes it; on a card from its start to its end there."""
    if isinstance(step, base.RemoteStep):
        return step.time_ms()
    if is_cuda():
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(2):  # while the card writes, the host gets ahead
            torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda").zero_()
        begin.record()
        step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
    begin = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - begin)


def interleave(steps: dict[str, Step], seconds: float = 8.0, least: int = 5) -> dict:
    """Median, 20th and 80th percentile of each step in ms, run in turn until time is up."""
    _settle(steps, seconds)
    samples: dict[str, list[float]] = {name: [] for name in steps}
    deadline = time.perf_counter() + seconds
    names = list(steps)
    while time.perf_counter() < deadline or len(samples[names[0]]) < least:
        for name in names:
            samples[name].append(time_ms(steps[name]))
        names = names[1:] + names[:1]
    return {name: _spread(values) for name, values in samples.items()}


def _settle(steps: dict[str, Step], seconds: float) -> None:
    """Warms up: until no step sets a new record by a tenth, three times in a row.

    Beyond what loads and compiles at first, memory has to settle: a virtual machine takes pages
    back that were free for seconds, and the first to use them again waits for its host. A step that
    writes 262 MB of new memory took 407 ms, five times in a row, then 34.
    """
    best = {name: time_ms(step) for name, step in steps.items()}
    calm = 0
    # From here on: compilers have taken theirs.
    deadline = time.perf_counter() + max(seconds, SETTLE_SECONDS)
    while calm < 3 and time.perf_counter() < deadline:
        times = {name: time_ms(step) for name, step in steps.items()}
        calm = calm + 1 if all(times[name] > 0.9 * best[name] for name in steps) else 0
        best = {name: min(best[name], times[name]) for name in steps}


def _spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    at = lambda share: ordered[min(len(ordered) - 1, int(share * len(ordered)))]  # noqa: E731
    return {"p20": at(0.2), "median": statistics.median(ordered), "p80": at(0.8)}


def extra_peaks_mb(module: str, cases: Sequence[tuple]) -> list[float]:
    """Peak memory of a step of each (contender, shape, dtype), beyond what its inputs hold."""
    return in_fresh_processes(_peak_of_step, [(module, *case) for case in cases])


def _peak_of_step(module: str, *case) -> float:
    return extra_peak_mb(make_step(importlib.import_module(module), *case))
