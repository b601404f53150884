"""Launcher of the CUDA engine: `csrc/cuda/dual_softmax.cu` fills the buffers.

A launch takes the maps of many heads, of any dtypes and sizes. Heads that are averaged first need
all of a row's maps at once: those the reference engine serves.
"""

import torch

from ..._attention import DISTANCES
from .problem import Problem


def refusal(problem: Problem) -> str | None:
    """Why the CUDA engine cannot serve these pairs, None where it can."""
    if any(pair.teacher_heads is None for pair in problem.pairs):
        return "it compares head by head, heads='mean' averages them first"
    return None


def fill(problem: Problem) -> None:
    """Fill the sums and every wanted gradient."""
    pairs = problem.pairs
    torch.ops.fakd_ext.score_maps(
        [pair.student for pair in pairs],
        [pair.teacher for pair in pairs],
        [pair.row_weights for pair in pairs if pair.row_weights is not None],
        [pair.row_weights is not None for pair in pairs],
        problem.coefficients.contiguous(),
        [pair.grad for pair in pairs if pair.grad is not None],
        [pair.grad is not None for pair in pairs],
        [pair.sums for pair in pairs],
        [head for pair in pairs for head in pair.teacher_heads],
        [pair.is_causal for pair in pairs],
        [-1 if pair.window is None else pair.window for pair in pairs],
        problem.are_scores,
        problem.temperature,
        DISTANCES.index(problem.distance),
    )
