"""Launcher of the C++ engine: `csrc/cpu/linear_kl.cpp` fills the buffers."""

import torch

from ... import _output_checks, _outputs, _pairs
from .problem import Problem


def fill(problem: Problem) -> None:
    """Fill the sums, the values of every token and every wanted gradient."""
    student, teacher, terms = problem.student, problem.teacher, problem.terms
    biases, bias_places = _outputs.places(student.bias, teacher.bias)
    grads, grad_places = _outputs.places(problem.grad_hidden, problem.grad_head, problem.grad_bias)
    torch.ops.fakd_ext.linear_kl(
        student.hidden,
        student.head,
        teacher.hidden,
        teacher.head,
        biases,
        _pairs.present([terms.labels]),
        _pairs.present([terms.row_weights]),
        terms.coefficients.contiguous(),
        bias_places + grad_places,
        grads,
        problem.sums,
        problem.per_token,
        terms.student_softcap or 0.0,
        terms.teacher_softcap or 0.0,
        terms.temperature,
        terms.jsd_beta,
        _output_checks.DISTANCES.index(terms.distance),
        terms.labels is not None,
        problem.block_bytes,
    )
