"""The Triton engine: blocks of tokens, between whose products the row kernel stands.

For a block of R tokens: S = H W^T and T = H_T W_T^T in float32, reused by one block after the
other; `_triton_rows.rows_kernel` makes dS of them, in the memory of S or in bfloat16 (see
`_output_products`); dH = dS W, dW += dS^T H. In all 2 N V (3 Ds + Dt) FLOPs; per token and entry of
the vocabulary the row kernel moves 18 to 20 bytes (8 for values alone), the products 12 to 16
beside heads and states. By data sheet an H100 takes 21 ps for these FLOPs in bfloat16, 2048 and
4096 wide, and 5.4 ps for the bytes of the row kernel.

Memory beyond the gradients: 8 R V bytes (2 R V more in bfloat16), R D float32, and dW in float32
where its own dtype is another. Nothing waits for the device. Triton is imported on first use, so
that the package imports without it.
"""

import torch

from ... import _output_products as products
from ..._output_rows import counted
from .problem import Problem


def fill(problem: Problem) -> None:
    """Fill the sums, the values of every token and every wanted gradient."""
    from ... import _triton_outputs as outputs

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
    with outputs.on_device(student.hidden.device):
        programs = [outputs.count_programs(rows.stop - rows.start, vocab) for rows in blocks]
        slots = outputs.Slots(sum(programs), problem.sums)
        for rows in blocks:
            s, t = student_logits.of(rows), teacher_logits.of(rows)
            x = counted(student.hidden[rows], terms.weights(rows))
            products.make_logits(s, x, student.head)
            products.make_logits(t, teacher.hidden[rows], teacher.head)
            grad = None if grad_logits is None else grad_logits.of(rows)
            outputs.launch_rows(
                outputs.Logits(s, student.bias, terms.student_softcap),
                outputs.Logits(t, teacher.bias, terms.teacher_softcap),
                grad,
                terms,
                rows,
                problem.per_token,
                slots,
                padded=products.padded(vocab),
            )
            if grad is not None:
                gradients.add(grad, x, student.head, rows)
        gradients.finish()
        slots.reduce()
