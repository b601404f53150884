"""The CUDA engine: blocks of tokens, between whose products the row kernel stands.

As in `triton_kernel`, which counts what it costs; `csrc/cuda/dual_softmax.cu` has the row kernel.
"""

import torch

from ... import _output_products as products
from ... import _outputs
from ..._output_rows import counted
from .problem import Problem


def fill(problem: Problem) -> None:
    """Fill the sums, the values of every token and every wanted gradient."""
    terms, student, teacher = problem.terms, problem.student, problem.teacher
    tokens, vocab = len(student.hidden), len(student.head)
    gradients = products.ProjectionGradients(
        problem.grad_hidden, problem.grad_head, problem.grad_bias
    )
    blocks = products.token_blocks(tokens, 2 * vocab * 4, problem.block_bytes)
    student_logits, teacher_logits = (
        products.Buffer(blocks, vocab, torch.float32, student.hidden) for _ in range(2)
    )
    grad_logits = None
    if gradients.is_wanted:
        dtype = gradients.logits_dtype(student.hidden, student.head)
        grad_logits = student_logits.of_gradients(dtype)
    biases = [
        None if side.bias is None else side.bias.float().contiguous() for side in (student, teacher)
    ]
    for rows in blocks:
        s, t = student_logits.of(rows), teacher_logits.of(rows)
        x = counted(student.hidden[rows], terms.weights(rows))
        products.make_logits(s, x, student.head)
        products.make_logits(t, teacher.hidden[rows], teacher.head)
        grad = None if grad_logits is None else grad_logits.of(rows)
        _outputs.launch_cuda_rows(s, t, grad, terms, rows, problem.per_token, *biases)
        if grad is not None:
            gradients.add(grad, x, student.head, rows)
    gradients.finish()
    _outputs.launch_cuda_sums(problem)
