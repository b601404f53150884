"""Launcher of the CUDA engine: `csrc/cuda/feature_alignment.cu` fills the buffers.

It serves pairs without a projection: one pass over student and teacher. Unlike Triton's kernels,
which are compiled for dtypes and widths, one launch takes pairs of any dtypes and widths.
"""

import torch

from .problem import Problem


def refusal(problem: Problem) -> str | None:
    """Why the CUDA engine cannot serve these pairs, None where it can."""
    projected = [index for index, pair in enumerate(problem.pairs) if pair.projection is not None]
    if projected:
        return f"it serves pairs without a projection, pair {projected[0]} has one"
    return None


def fill(problem: Problem) -> None:
    """Fill `problem.sums` and every wanted gradient."""
    weights = [pair.row_weights for pair in problem.pairs if pair.row_weights is not None]
    grads = [pair.grad_student for pair in problem.pairs if pair.grad_student is not None]
    torch.ops.fakd_ext.align_features(
        [pair.student for pair in problem.pairs],
        [pair.teacher for pair in problem.pairs],
        weights,
        [pair.row_weights is not None for pair in problem.pairs],
        problem.coefficients.contiguous(),
        grads,
        [pair.grad_student is not None for pair in problem.pairs],
        problem.sums,
        problem.is_squared,
        problem.eps,
    )


def describe(problem: Problem) -> list[str]:
    """The kernels that `fill` would launch, in words and in order; nothing is computed."""
    return [
        f"align_rows: value and gradient, {len(problem.pairs)} pairs",
        "sum_slots: their values",
    ]
