"""Launcher of the CUDA engine: `csrc/cuda/feature_alignment.cu` fills the buffers.

Pairs without a projection take one pass over student and teacher; `cuda_projected` has the others.
Unlike Triton's kernels, which are compiled for dtypes and widths, one launch takes pairs of any
dtypes and widths.
"""

import torch

from . import cuda_projected
from .problem import Problem

_NO_GRAM = (
    "it takes the direct route alone: which rows cancel on the gram route only the card knows, and "
    "the products of torch cannot leave rows out"
)
# What `dispatch` says where Triton serves first.
AFTER_TRITON = (
    "it could serve, but pairs with a projection are Triton's first, whose gram route takes fewer "
    "FLOPs and whose products leave rows out (not measured on a card); engine='cuda' asks for it"
)


def refusal(problem: Problem) -> str | None:
    """Why the CUDA engine cannot serve these pairs, None where it can."""
    is_gram = any(pair.route == "gram" for pair in problem.pairs)
    return _NO_GRAM if is_gram and problem.is_route_forced else None


def fill(problem: Problem) -> None:
    """Fill `problem.sums` and every wanted gradient."""
    same, projected = _split(problem)
    if projected:
        cuda_projected.fill(problem, projected)
    if not same:
        return
    if not projected:
        _fill_same(problem, same, problem.coefficients.contiguous(), problem.sums)
        return
    sums = problem.sums.new_empty((len(same), 2))
    _fill_same(problem, same, torch.stack([problem.coefficients[i] for i in same]), sums)
    for place, index in enumerate(same):
        problem.sums[index] = sums[place]


def describe(problem: Problem) -> list[str]:
    """The kernels that `fill` would launch, in words and in order; nothing is computed."""
    same, projected = _split(problem)
    words = cuda_projected.describe(problem, projected) if projected else []
    if same:
        words.append(f"align_rows: value and gradient, {len(same)} pairs")
        words.append("sum_slots: their values")
    return words


def _split(problem: Problem) -> tuple[list[int], list[int]]:
    """The pairs without and with a projection."""
    same = [i for i, pair in enumerate(problem.pairs) if pair.projection is None]
    return same, [i for i, pair in enumerate(problem.pairs) if pair.projection is not None]


def _fill_same(
    problem: Problem, indices: list[int], coefficients: torch.Tensor, sums: torch.Tensor
) -> None:
    pairs = [problem.pairs[index] for index in indices]
    torch.ops.fakd_ext.align_features(
        [pair.student for pair in pairs],
        [pair.teacher for pair in pairs],
        [pair.row_weights for pair in pairs if pair.row_weights is not None],
        [pair.row_weights is not None for pair in pairs],
        coefficients,
        [pair.grad_student for pair in pairs if pair.grad_student is not None],
        [pair.grad_student is not None for pair in pairs],
        sums,
        problem.is_squared,
        problem.eps,
    )
