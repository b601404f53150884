"""The Triton engine: one row kernel for pairs with and without a projection.

    launches       rows of many pairs in a launch, and where their values go
    variants       kernels with their compiled constants, for launches and dry compiles
    row_kernels    device code, row_math its arithmetic

Triton is imported on first use, so that the package imports without it.
"""

import contextlib

import torch

from .. import projected
from ..problem import Problem


def fill(problem: Problem) -> None:
    """Fill the sums and gradients of `problem`, on tensors of one CUDA device."""
    from .launches import Launches

    device = problem.sums.device
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        same, others = projected.split(problem)
        launches = Launches(problem)
        if same:
            launches.launch_same(same)
        if others:
            projected.fill(problem, others, launches.launch_parts)
        launches.reduce()


def describe(problem: Problem) -> list[str]:
    """What `fill` would do, in words and in order; nothing is computed."""
    from .launches import grouped, same_rows

    same, others = projected.split(problem)
    words = [
        f"align_rows_kernel: value and gradient, {len(group)} pairs without a projection"
        for group in grouped(same_rows(problem, same))
    ]
    if others:
        words.append(projected.describe(problem, others, "align_rows_kernel"))
    return [*words, "reduce_kernel: their values"]
