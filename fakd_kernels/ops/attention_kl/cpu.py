"""Launcher of the C++ engine: `csrc/cpu/attention_kl.cpp` fills the buffers."""

import torch

from ..._attention import CPU_DISTANCES
from .problem import Problem


def fill(problem: Problem) -> None:
    """Fill the sums and every wanted gradient."""
    row_weights, grads, places = [], [], []

    def place(tensors: list, tensor) -> int:
        if tensor is None:
            return -1
        tensors.append(tensor)
        return len(tensors) - 1

    for pair in problem.pairs:
        places += [
            place(row_weights, pair.row_weights),
            place(grads, pair.grad_q),
            place(grads, pair.grad_k),
        ]
    sides = [(pair.student, pair.teacher) for pair in problem.pairs]
    torch.ops.fakd_ext.attention_kl(
        [s.q for s, _ in sides],
        [s.k for s, _ in sides],
        [t.q for _, t in sides],
        [t.k for _, t in sides],
        row_weights,
        problem.coefficients.contiguous(),
        places,
        [head for pair in problem.pairs for head in pair.teacher_heads or ()],
        grads,
        [pair.sums for pair in problem.pairs],
        [s.scale for s, _ in sides],
        [t.scale for _, t in sides],
        [s.softcap or 0.0 for s, _ in sides],
        [t.softcap or 0.0 for _, t in sides],
        [pair.is_causal for pair in problem.pairs],
        [-1 if pair.window is None else pair.window for pair in problem.pairs],
        problem.temperature,
        CPU_DISTANCES[problem.distance],
    )
