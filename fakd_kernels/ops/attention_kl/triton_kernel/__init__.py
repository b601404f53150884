"""The Triton engine: `match` and `mean` lay a call out as launches.

    launches, lines        what launches share; from a layer pair to the line of a table
    variants, tiles        kernels with their compiled constants; tile sizes by generation of card
    forward_kernel, gradient_kernel, mean_kernels, small_kernels       device code
    rows, fields, tile_math       device functions: how a program finds its rows; mathematics

Triton is imported on first use, so that the package imports without it.
"""

import contextlib

import torch

from ..problem import Problem

WIDEST_HEAD = 128  # tiles for wider ones do not fit the shared memory of every card yet


def fill(problem: Problem) -> None:
    """Fill the sums and gradients of `problem`, on tensors of one CUDA device."""
    from . import match, mean
    from .launches import Call

    device = problem.coefficients.device
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        call = Call(problem)
        if problem.pairs[0].teacher_heads is None:
            mean.fill(call)
        else:
            match.fill(call)
        call.reduce()
