"""From the registered op's arguments to the engine that serves them: the one place that decides."""

from torch import Tensor

from ... import _engines, _outputs, _pairs
from . import cpu, cuda, reference, triton_kernel
from .problem import Problem

FILL = {
    "reference": reference.fill,
    "cpu": cpu.fill,
    "triton": triton_kernel.fill,
    "cuda": cuda.fill,
}


def resolve(
    student,
    teacher,
    labels,
    row_weights,
    coefficients,
    wants_grad,
    vocab,
    temperature,
    student_softcap,
    teacher_softcap,
    distance,
    jsd_beta,
    engine,
) -> tuple[Problem, str, Tensor]:
    """The problem with its buffers, the engine that serves it, and the gradient ([0] for none)."""
    (grad,) = _pairs.grad_buffers([student], [wants_grad])
    problem = Problem(
        student=student.narrow(1, 0, vocab),
        teacher=teacher.narrow(1, 0, vocab),
        terms=_outputs.Terms(
            labels,
            row_weights,
            coefficients,
            temperature,
            student_softcap or None,
            teacher_softcap or None,
            distance,
            jsd_beta,
        ),
        grad=_outputs.compared(grad, vocab, axis=1),
        sums=coefficients.new_zeros(2),
        per_token=coefficients.new_zeros(student.shape[0], 2),
    )
    chosen = _engines.choose("logit_kl", student.device, _outputs.dense_refusals(problem), engine)
    return problem, chosen, coefficients.new_empty(0) if grad is None else grad


def explain(*lowered) -> str:
    """The engine, the reasons against the others, and the sizes, in words."""
    problem, chosen, _ = resolve(*lowered)
    lines = _engines.describe("logit_kl", chosen, _outputs.dense_refusals(problem))
    tokens, vocab = problem.student.shape
    lines.append(f"  {tokens} tokens, vocabulary of {vocab}, row by row")
    return "\n".join(lines)
