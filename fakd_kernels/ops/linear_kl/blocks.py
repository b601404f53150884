"""What the GPU engines do alike: blocks of tokens, whose logits the products make and take.

For a block of R tokens: S = H W^T and T = H_T W_T^T in float32, reused by one block after the
other; a row kernel makes dS of them, in the memory of S, or in bfloat16 for a part of M tokens
(see `_output_products`); dH = dS W, dW = dS^T H. In all 2 N V (3 Ds + Dt) FLOPs; per token and
entry of the vocabulary the row kernel moves 18 to 20 bytes (8 for values alone), the products 12
to 16 beside heads and states. By data sheet an H100 takes 21 ps for these FLOPs in bfloat16, 2048
and 4096 wide, and 5.4 ps for the bytes of the row kernel.

Memory beyond the gradients: 8 R V bytes, and in bfloat16 2 M V (M = N up to 2 Ds) and 4 M Ds more;
of other half heads 4 V Ds, for dW in float32. Nothing waits for the device.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _output_products as products
from ..._output_rows import counted
from .problem import Problem


class Block(NamedTuple):
    """The logits of some tokens."""

    rows: slice
    student: Tensor  # [R, V] float32
    teacher: Tensor  # likewise
    grad: Tensor | None  # [R, V], for the gradient of the student's; may be `student`


def rows_of_blocks(problem: Problem) -> list[slice]:
    """The tokens of each block."""
    token_bytes = 2 * len(problem.student.head) * 4
    return products.token_blocks(len(problem.student.hidden), token_bytes, problem.block_bytes)


def blocks_between_products(problem: Problem, blocks: list[slice]) -> Iterator[Block]:
    """Each block with its logits; its gradient, once filled, goes into those of the problem."""
    student, teacher, vocab = problem.student, problem.teacher, len(problem.student.head)
    hidden = counted(student.hidden, problem.terms.weights(slice(None)))
    gradients = products.ProjectionGradients(
        hidden,
        student.head,
        (problem.grad_hidden, problem.grad_head, problem.grad_bias),
        blocks,
    )
    student_logits, teacher_logits = (
        products.logits_buffer(blocks, vocab, torch.float32, hidden) for _ in range(2)
    )
    for rows in blocks:
        count = rows.stop - rows.start
        s, t = student_logits[:count], teacher_logits[:count]
        products.make_logits(s, hidden[rows], student.head)
        products.make_logits(t, teacher.hidden[rows], teacher.head)
        grad = gradients.room(rows, s)
        yield Block(rows, s, t, grad)
        if grad is not None:
            gradients.add(rows, grad)
    gradients.finish()
