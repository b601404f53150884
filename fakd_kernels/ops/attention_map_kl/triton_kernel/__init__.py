"""The Triton engine: one launch for the maps of all pairs that are alike, and one for their sums.

    launches, fields       from a call to launches; the line of a pair in their table
    variants               kernels with their compiled constants
    match_kernels, mean_kernels      device code: heads compared one by one, or averaged first
    rows, distances        device functions: how a program finds its rows; mathematics

Triton is imported on first use, so that the package imports without it.
"""

from ..problem import Problem


def fill(problem: Problem) -> None:
    """Fill the sums and gradients of `problem`, on tensors of one CUDA device."""
    from . import launches

    launches.fill(problem)
