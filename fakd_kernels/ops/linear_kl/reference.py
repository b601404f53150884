"""Output alignment from hidden states in plain PyTorch: the specification, and the engine that
runs anywhere."""

import torch.nn.functional as F
from torch import Tensor

from ... import _output_rows as rows_of
from .problem import Problem, Side

_BLOCK_BYTES = 64 << 20  # of both sides' logits; enough tokens that the products run at full speed


def linear_kl_reference(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    distance: str = "kl",
    jsd_beta: float = 0.5,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    vocab: str | None = None,
    **weights,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the loss as its formula is written, logits and all; autograd gives the gradients.

    With float64 inputs it is the oracle of the tests, with others the eager baseline of tests and
    benchmarks: logits in the dtype of their inputs, as models make them, then float32 at least.
    Arguments as in `linear_kl`.

    Returns:
        loss [], kl [], ce [], per_token [N], tokens [].
    """
    values = rows_of.dense_reference(
        rows_of.linear_reference(student_hidden, student_head, student_bias),
        rows_of.linear_reference(teacher_hidden, teacher_head, teacher_bias),
        labels,
        temperature=temperature,
        distance=distance,
        jsd_beta=jsd_beta,
        student_softcap=student_softcap,
        teacher_softcap=teacher_softcap,
        vocab=vocab,
    )
    return rows_of.mean_reference(*values, labels, mask, temperature=temperature, **weights)


def fill(problem: Problem) -> None:
    """The reference engine: blocks of tokens, so that no N x V logits exist.

    Runs on every device and dtype, float64 included. Heads of less than float32 are copied to it.
    """
    terms, work = problem.terms, problem.terms.coefficients.dtype
    student, teacher = (
        Side(side.hidden, side.head.to(work), None if side.bias is None else side.bias.to(work))
        for side in (problem.student, problem.teacher)
    )
    gradients = rows_of.ProjectionGradients(
        problem.grad_hidden, problem.grad_head, problem.grad_bias, work
    )
    for rows in rows_of.blocks(
        problem.per_token, 2 * len(student.head), problem.block_bytes or _BLOCK_BYTES
    ):
        weights = terms.weights(rows)
        x, t = (rows_of.counted(side.hidden[rows].to(work), weights) for side in (student, teacher))
        grad = rows_of.dense_block(
            F.linear(x, student.head, student.bias),
            F.linear(t, teacher.head, teacher.bias),
            terms,
            rows,
            problem.per_token,
            gradients.is_wanted,
        )
        if grad is not None:
            gradients.add(grad, x, student.head, rows)
    gradients.finish()
    rows_of.fill_sums(problem.sums, terms, problem.per_token)
