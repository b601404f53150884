"""Fresh processes for what is measured, forked from one that has imported everything."""

import functools
import gc
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import ForkServerContext
from typing import TypeVar

import torch

from .device import is_cuda

T = TypeVar("T")


@functools.cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.imported"])
    return context


def in_fresh_process(function: Callable[..., T], *arguments: object) -> T:
    """The result of a call in a process of its own.

    What ran before in a process changes what its allocator does, and with it the time of
    everything that stores large intermediates: the same eager step took 157 or 356 ms. For that
    reason checks, which compute in float64, run apart from what is timed. On a card torch counts
    memory itself and a kernel's time has no history, while a process takes seconds to reach it:
    there the call is made here.
    """
    return in_fresh_processes(function, [arguments], at_once=1)[0]


def in_fresh_processes(
    function: Callable[..., T], calls: Sequence[tuple], at_once: int = 2
) -> list[T]:
    """The results of many calls, each in a process of its own; of what is not timed."""
    if is_cuda():
        return [_in_this_process(function, call) for call in calls]
    with ProcessPoolExecutor(at_once, mp_context=_context(), max_tasks_per_child=1) as pool:
        return [future.result() for future in [pool.submit(function, *call) for call in calls]]


def _in_this_process(function: Callable[..., T], arguments: tuple) -> T:
    gc.collect()
    torch.cuda.empty_cache()
    return function(*arguments)
