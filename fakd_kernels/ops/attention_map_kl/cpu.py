"""Launcher of the C++ engine: `csrc/cpu/attention_map_kl.cpp` fills the buffers."""

import torch

from ..._attention import CPU_DISTANCES
from .problem import Problem


def fill(problem: Problem) -> None:
    """Fill the sums and every wanted gradient."""
    row_weights, grads, places = [], [], []
    for pair in problem.pairs:
        for tensors, tensor in ((row_weights, pair.row_weights), (grads, pair.grad)):
            places.append(-1 if tensor is None else len(tensors))
            if tensor is not None:
                tensors.append(tensor)
    torch.ops.fakd_ext.attention_map_kl(
        [pair.student for pair in problem.pairs],
        [pair.teacher for pair in problem.pairs],
        row_weights,
        problem.coefficients.contiguous(),
        places,
        [head for pair in problem.pairs for head in pair.teacher_heads or ()],
        grads,
        [pair.sums for pair in problem.pairs],
        [pair.is_causal for pair in problem.pairs],
        [-1 if pair.window is None else pair.window for pair in problem.pairs],
        problem.are_scores,
        problem.temperature,
        CPU_DISTANCES[problem.distance],
    )
