"""Launcher of the CUDA engine: `csrc/cuda/feature_alignment.cu` fills the buffers.

Pairs without a projection take one pass over student and teacher; `projected` has the others, whose
row kernel is `csrc/cuda/projected_rows.cu`. Unlike Triton's kernels, which are compiled for dtypes
and widths, one launch takes pairs of any dtypes and widths.
"""

import torch
from torch import Tensor

from . import projected
from .problem import Problem


def fill(problem: Problem) -> None:
    """Fill `problem.sums` and every wanted gradient."""
    same, others = projected.split(problem)
    if others:
        _fill_projected(problem, others)
    if not same:
        return
    if not others:
        _fill_same(problem, same, problem.coefficients.contiguous(), problem.sums)
        return
    sums = problem.sums.new_empty((len(same), 2))
    _fill_same(problem, same, torch.stack([problem.coefficients[i] for i in same]), sums)
    for place, index in enumerate(same):
        problem.sums[index] = sums[place]


def describe(problem: Problem) -> list[str]:
    """The kernels that `fill` would launch, in words and in order; nothing is computed."""
    same, others = projected.split(problem)
    words = []
    if others:
        kernel = "1 launch of align_projected_rows"
        words.append(projected.describe(problem, others, kernel))
        words.append("sum_row_values: the values of all rows of a pair")
    if same:
        words.append(f"align_rows: value and gradient, {len(same)} pairs")
        words.append("sum_slots: their values")
    return words


def _fill_projected(problem: Problem, indices: list[int]) -> None:
    counts = [len(problem.pairs[index].student) for index in indices]
    rows = problem.sums.new_empty((sum(counts), 2), dtype=torch.float32)
    values = dict(zip(indices, rows.split(counts), strict=True))
    coefficients = problem.coefficients.contiguous()

    def launch_rows(parts: list[projected.Part]) -> None:
        """Launched once for each dtype of dP among them."""
        weights = [_of_rows(part.pair.row_weights, part.rows) for part in parts]
        torch.ops.fakd_ext.align_projected(
            [part.projected for part in parts],
            [part.pair.teacher[part.rows] for part in parts],
            [w for w in weights if w is not None],
            [w is not None for w in weights],
            coefficients,
            [part.index for part in parts],
            [part.grad for part in parts if part.grad is not None],
            [part.grad is not None for part in parts],
            [values[part.index][part.rows] for part in parts],
            problem.is_squared,
            problem.eps,
        )

    projected.fill(problem, indices, launch_rows)
    sums = [problem.sums[index] for index in indices]
    torch.ops.fakd_ext.sum_values([values[index] for index in indices], sums)


def _of_rows(weights: Tensor | None, rows: slice) -> Tensor | None:
    return None if weights is None else weights[rows]


def _fill_same(problem: Problem, indices: list[int], coefficients: Tensor, sums: Tensor) -> None:
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
