"""Launcher of the CUDA engine: `csrc/cuda/dual_softmax.cu` fills the buffers.

One launch for all tokens, and one that adds their values up. Unlike Triton's kernel, which is
compiled for dtypes, widths and what is asked of it, it is there for all.
"""

from ... import _outputs
from .problem import Problem


def fill(problem: Problem) -> None:
    """Fill the sums, the values of every token and the gradient, if wanted."""
    _outputs.launch_cuda_rows(
        problem.student,
        problem.teacher,
        problem.grad,
        problem.terms,
        slice(0, len(problem.per_token)),
        problem.per_token,
    )
    _outputs.launch_cuda_sums(problem)
