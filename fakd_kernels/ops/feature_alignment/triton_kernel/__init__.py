"""The Triton engine: `plan` lays a call out as steps on the device, `fill` carries them out.

    plan                   -> steps, group: the steps, and what they are made with
      gram, direct         the two routes of pairs with a projection
    variants               kernels with their compiled constants, for launches and dry compiles
      arithmetic, tiles    the precision of products; tile sizes by generation of card
    row_kernels, product_kernels, outer_kernel, small_kernels, row_math      device code

Triton is imported on first use, so that the package imports without it.
"""

import contextlib

import torch

from ..problem import Problem


def fill(problem: Problem) -> None:
    """Fill the sums and gradients of `problem`, on tensors of one CUDA device."""
    from .plan import plan

    device = problem.sums.device
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for step in plan(problem, device):
            step.run()


def describe(problem: Problem) -> list[str]:
    """The launches that `fill` would make, in words and in order; nothing is computed."""
    from .plan import plan

    return [step.words for step in plan(problem, torch.device("meta"))]
