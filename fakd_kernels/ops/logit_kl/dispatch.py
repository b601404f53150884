"""From the registered op's arguments to the engine that serves them: the one place that decides."""

from torch import Tensor

from ... import _engines, _outputs, _pairs
from . import cpu, reference, triton_kernel
from .problem import Problem

FILL = {"reference": reference.fill, "cpu": cpu.fill, "triton": triton_kernel.fill}


def resolve(
    student,
    teacher,
    labels,
    row_weights,
    coefficients,
    wants,
    vocab,
    temperature,
    student_softcap,
    teacher_softcap,
    distance,
    jsd_beta,
    engine,
) -> tuple[Problem, str, list[Tensor]]:
    """The problem with its buffers, the engine that serves it, and the wanted gradient."""
    grads = _pairs.grad_buffers([student], wants)
    problem = Problem(
        student=student[:, :vocab],
        teacher=teacher[:, :vocab],
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
        grad=_outputs.compared(grads[0], vocab, axis=1),
        sums=coefficients.new_zeros(2),
        per_token=coefficients.new_zeros(student.shape[0], 2),
    )
    chosen = _engines.choose("logit_kl", student.device, _outputs.refusals(problem), engine)
    return problem, chosen, _pairs.present(grads)


def explain(*lowered) -> str:
    """The engine, the reasons against the others, and the sizes, in words."""
    problem, chosen, _ = resolve(*lowered)
    lines = _engines.describe("logit_kl", chosen, _outputs.refusals(problem))
    tokens, vocab = problem.student.shape
    lines.append(f"  {tokens} tokens, vocabulary of {vocab}, row by row")
    return "\n".join(lines)
