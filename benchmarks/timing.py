"""How long a step takes: interleaved, medians with spread; on a card by its own clock."""

import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from . import base
from .device import is_cuda, synchronize

Step = Callable[[], object]

# Cold caches: before a step this much is written twice, more than any card's L2 holds. It also
# keeps the card busy until the host has queued the first kernels of the step.
FLUSH_BYTES = 256 << 20
HOST_CALLS = 5


@functools.cache
def _flushed() -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")


def time_ms(step: Step) -> float:
    """Of one call, in the process that computes it."""
    if isinstance(step, base.RemoteStep):
        return step.time_ms()
    if is_cuda():
        return _between_events_ms(step)
    begin = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - begin)


def _between_events_ms(step: Step) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(2):
        _flushed().zero_()
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def interleave(steps: dict[str, Step], seconds: float = 8.0, least: int = 5) -> dict:
    """Median, 20th and 80th percentile of each step in ms, run in turn until time is up."""
    for step in steps.values():
        time_ms(step)
        time_ms(step)
    samples: dict[str, list[float]] = {name: [] for name in steps}
    deadline = time.perf_counter() + seconds
    names = list(steps)
    while time.perf_counter() < deadline or len(samples[names[0]]) < least:
        for name in names:
            samples[name].append(time_ms(steps[name]))
        names = names[1:] + names[:1]
    return {name: _spread(values) for name, values in samples.items()}


def _spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    at = lambda share: ordered[min(len(ordered) - 1, int(share * len(ordered)))]  # noqa: E731
    return {"p20": at(0.2), "median": statistics.median(ordered), "p80": at(0.8)}


def host_ms(step: Step) -> float:
    """The shortest time until a call returns, the card still at work: what the host takes."""
    times = []
    for _ in range(HOST_CALLS):
        synchronize()
        begin = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - begin))
    synchronize()
    return min(times)


def device_ms(step: Step) -> float:
    """The sum of the times of a step's kernels: what the card takes, however slow the host."""
    synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        step()
        synchronize()
    # The host's calls that launch them are in the record too.
    kernels = [e for e in record.key_averages() if e.device_type != DeviceType.CPU]
    return sum(kernel.self_device_time_total for kernel in kernels) / 1e3
