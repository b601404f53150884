"""The CUDA engine: the row kernel of `csrc/cuda/dual_softmax.cu` between products, see `blocks`."""

from ... import _outputs
from .blocks import blocks_between_products, rows_of_blocks
from .problem import Problem


def fill(problem: Problem) -> None:
    """Fill the sums, the values of every token and every wanted gradient."""
    biases = [
        None if side.bias is None else side.bias.float().contiguous()
        for side in (problem.student, problem.teacher)
    ]
    for block in blocks_between_products(problem, rows_of_blocks(problem)):
        _outputs.launch_cuda_rows(
            block.student,
            block.teacher,
            block.grad,
            problem.terms,
            block.rows,
            problem.per_token,
            *biases,
        )
    _outputs.launch_cuda_sums(problem)
