"""Launcher of the C++ engine: `csrc/cpu/topk_kl.cpp` fills the buffers."""

import torch

from ... import _outputs, _pairs
from .problem import Problem


def fill(problem: Problem) -> None:
    """Fill the sums, the values of every token and every wanted gradient."""
    terms = problem.terms
    biases, bias_places = _outputs.places(problem.bias)
    grads, grad_places = _outputs.places(problem.grad_hidden, problem.grad_head, problem.grad_bias)
    torch.ops.fakd_ext.topk_kl(
        problem.hidden,
        problem.head,
        biases,
        problem.indices,
        problem.logprobs,
        _pairs.present([terms.labels]),
        _pairs.present([terms.row_weights]),
        terms.coefficients.contiguous(),
        bias_places + grad_places,
        grads,
        problem.sums,
        problem.per_token,
        terms.student_softcap or 0.0,
        terms.temperature,
        terms.labels is not None,
        problem.has_ghost,
        problem.block_bytes,
    )
