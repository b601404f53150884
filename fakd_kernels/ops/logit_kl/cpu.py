"""Launcher of the C++ engine: `csrc/cpu/logit_kl.cpp` fills the buffers."""

import torch

from ... import _output_checks, _pairs
from .problem import Problem


def fill(problem: Problem) -> None:
    """Fill the sums, the values of every token and the gradient, if wanted."""
    terms = problem.terms
    torch.ops.fakd_ext.logit_kl(
        problem.student,
        problem.teacher,
        _pairs.present([terms.labels]),
        _pairs.present([terms.row_weights]),
        terms.coefficients.contiguous(),
        _pairs.present([problem.grad]),
        problem.sums,
        problem.per_token,
        terms.student_softcap or 0.0,
        terms.teacher_softcap or 0.0,
        terms.temperature,
        terms.jsd_beta,
        _output_checks.DISTANCES.index(terms.distance),
        terms.labels is not None,
    )
