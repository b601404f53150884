"""The Triton engine: blocks of tokens, between whose products the row kernel stands.

For a block of R tokens: S = H W^T in float32, reused by one block after the other;
`kernel.top_rows_kernel` makes dS of it, in its memory or in bfloat16 (see `_output_products`);
dH = dS W, dW += dS^T H. In all 6 N V D FLOPs, also where only k logits of a token have a gradient:
sums over tokens are then those of a product, in a fixed order, without atomics.

Memory beyond the gradients: 4 R V bytes (2 R V more in bfloat16), R D float32, and dW in float32
where its own dtype is another. Nothing waits for the device. Triton is imported on first use, so
that the package imports without it.
"""

import torch

from .... import _output_products as products
from ...._output_rows import counted
from ..problem import Problem

MOST_ENTRIES = 4096  # of a token: they are all kept in registers


def fill(problem: Problem) -> None:
    """Fill the sums, the values of every token and every wanted gradient."""
    from .... import _triton_outputs as outputs
    from .launch import count_programs, launch_rows

    hidden, head, terms = problem.hidden, problem.head, problem.terms
    vocab, entries = len(head), problem.indices.shape[1]
    gradients = products.ProjectionGradients(
        problem.grad_hidden, problem.grad_head, problem.grad_bias
    )
    blocks = products.token_blocks(len(hidden), vocab * 4, problem.block_bytes)
    logits = products.Buffer(blocks, vocab, torch.float32, hidden)
    grad_logits = None
    if gradients.is_wanted:
        grad_logits = logits.of_gradients(gradients.logits_dtype(hidden, head))
    with outputs.on_device(hidden.device):
        programs = [count_programs(rows.stop - rows.start, vocab, entries) for rows in blocks]
        slots = outputs.Slots(sum(programs), problem.sums)
        for rows in blocks:
            s, x = logits.of(rows), counted(hidden[rows], terms.weights(rows))
            products.make_logits(s, x, head)
            grad = None if grad_logits is None else grad_logits.of(rows)
            launch_rows(problem, s, grad, rows, slots)
            if grad is not None:
                gradients.add(grad, x, head, rows)
        gradients.finish()
        slots.reduce()
