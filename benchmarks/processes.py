"""In which process a call runs, and what is forgotten after it."""

import gc
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import torch

from .device import is_cuda

T = TypeVar("T")
Case = tuple[str, object, str]  # a bench module, a shape or its name, a dtype


def in_fresh_process(function: Callable[..., T], *arguments: object) -> T:
    """The result of a call in a process of its own; on a card in this one.

    What ran before in a process changes what its allocator does, and with it the time of
    everything that stores large intermediates: the same eager step took 157 or 356 ms. For that
    reason checks, which compute in float64, run apart from what is timed.

    Not so on a card: torch's caching allocator counts exactly, history does not change the times
    of kernels, and a process takes seconds to reach the card.
    """
    if is_cuda():
        try:
            return function(*arguments)
        finally:
            release()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()


def release() -> None:
    """Give back a card's memory and forget what was compiled, of which disks keep the kernels."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def attempt(name: str, call: Callable[[], T]) -> T | None:
    """The result of a call; on a card None if it fails, which then costs one figure, not all."""
    try:
        return call()
    except Exception as error:
        if not is_cuda():
            raise
        sys.stderr.write(f"{name} is left out: {in_words(error)}\n")
    gc.collect()  # outside, where the error holds no tensors any more
    torch.cuda.empty_cache()
    return None


def in_words(error: Exception) -> str:
    """Its kind and the beginning of what it says: compilers say pages."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def side_by_side(tasks: dict[Case, Callable[..., T]], processes: int) -> dict[Case, T | None]:
    """What a function returns for each case, None where its process was lost."""
    spawn = multiprocessing.get_context("spawn")
    options = {"mp_context": spawn, "initializer": _share_card, "initargs": (processes,)}
    results: dict[Case, T | None] = {}
    with ProcessPoolExecutor(processes, **options) as pool:
        futures = {case: pool.submit(function, *case) for case, function in tasks.items()}
        for case, future in futures.items():
            try:
                results[case] = future.result()
            except Exception as error:
                sys.stderr.write(f"{case}: no answer: {in_words(error)}\n")
                results[case] = None
    return results


def _share_card(processes: int) -> None:
    """What asks for more than its share must fail, not what runs beside it."""
    if is_cuda():
        torch.cuda.set_per_process_memory_fraction(0.9 / processes)  # contexts take the rest
