"""Alignment of logits in plain PyTorch: the specification, and the engine that runs anywhere."""

from torch import Tensor

from ... import _output_rows as rows_of
from .problem import Problem

_BLOCK_BYTES = 32 << 20  # of one side's logits in float32


def logit_kl_reference(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
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
    """Compute the loss as its formula is written; autograd gives the gradient.

    With float64 inputs it is the oracle of the tests, with others the eager baseline of tests and
    benchmarks. Softmax and sums are in float32 at least. Arguments as in `logit_kl`.

    Returns:
        loss [], kl [], ce [], per_token [N], tokens [].
    """
    values = rows_of.dense_reference(
        student_logits.flatten(0, -2),
        teacher_logits.flatten(0, -2),
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
    """The reference engine: blocks of tokens, so that no copy of all log-probabilities exists.

    Runs on every device and dtype, float64 included.
    """
    terms, work = problem.terms, problem.terms.coefficients.dtype
    for rows in rows_of.blocks(problem.per_token, problem.student.shape[1], _BLOCK_BYTES):
        weights = terms.weights(rows)
        student, teacher = (
            rows_of.counted(logits[rows].to(work), weights)
            for logits in (problem.student, problem.teacher)
        )
        wants = problem.grad is not None
        grad = rows_of.dense_block(student, teacher, terms, rows, problem.per_token, wants)
        if wants:
            problem.grad[rows] = grad
    rows_of.fill_sums(problem.sums, terms, problem.per_token)
