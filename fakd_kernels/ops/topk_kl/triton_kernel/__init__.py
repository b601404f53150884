"""The Triton engine: blocks of tokens, between whose products the row kernel stands.

For a block of R tokens: S = H W^T in float32, reused by one block after the other;
`kernel.top_rows_kernel` makes dS of it, in its memory, or in bfloat16 for a part of M tokens (see
`_output_products`); dH = dS W, dW = dS^T H. In all 6 N V D FLOPs, also where only k logits of a
token have a gradient: sums over tokens are then those of a product, in a fixed order, without
atomics.

Memory beyond the gradients: 4 R V bytes, and in bfloat16 2 M V (M = N up to 2 D) and 4 M D more; of
other half heads 4 V D, for dW in float32. Nothing waits for the device. Triton is imported on first
use, so that the package imports without it.
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
    hidden = counted(hidden, terms.weights(slice(None)))
    blocks = products.token_blocks(len(hidden), vocab * 4, problem.block_bytes)
    gradients = products.ProjectionGradients(
        hidden, head, (problem.grad_hidden, problem.grad_head, problem.grad_bias), blocks
    )
    logits = products.logits_buffer(blocks, vocab, torch.float32, hidden)
    with outputs.on_device(hidden.device):
        programs = [count_programs(rows.stop - rows.start, vocab, entries) for rows in blocks]
        slots = outputs.Slots(sum(programs), problem.sums)
        for rows in blocks:
            s = logits[: rows.stop - rows.start]
            products.make_logits(s, hidden[rows], head)
            grad = gradients.room(rows, s)
            launch_rows(problem, s, grad, rows, slots)
            if grad is not None:
                gradients.add(rows, grad)
        gradients.finish()
        slots.reduce()
