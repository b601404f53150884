"""Launcher of the C++ engine: `csrc/cpu/feature_alignment.cpp` fills the buffers."""

import torch
from torch import Tensor

from .problem import Problem

_ROUTES = {"none": 0, "direct": 1, "gram": 2}


class _Places:
    """Tensors listed once, and referred to by place; -1 for None."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def of(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return -1
        for place, known in enumerate(self.tensors):
            if known is tensor:
                return place
        self.tensors.append(tensor)
        return len(self.tensors) - 1


def fill(problem: Problem) -> None:
    """Fill `problem.sums` and every wanted gradient."""
    projections, biases, row_weights = _Places(), _Places(), _Places()
    grad_student, grad_projections, grad_biases = _Places(), _Places(), _Places()
    places = []
    for pair in problem.pairs:
        places += [
            projections.of(pair.projection),
            biases.of(pair.bias),
            row_weights.of(pair.row_weights),
            grad_student.of(pair.grad_student),
            grad_projections.of(problem.grad_projection(pair)),
            grad_biases.of(problem.grad_bias(pair)),
            _ROUTES[pair.route],
        ]
    torch.ops.fakd_ext.feature_alignment(
        [pair.student for pair in problem.pairs],
        [pair.teacher for pair in problem.pairs],
        projections.tensors,
        biases.tensors,
        row_weights.tensors,
        problem.coefficients.contiguous(),
        places,
        grad_student.tensors,
        grad_projections.tensors,
        grad_biases.tensors,
        problem.sums,
        problem.is_squared,
        problem.is_route_forced,
        problem.eps,
    )
