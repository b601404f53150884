"""From the registered op's arguments to the engine that serves them: the one place that decides."""

from torch import Tensor

from ... import _engines, _outputs, _pairs
from . import cpu, cuda, reference, triton_kernel
from .problem import Problem, Side

FILL = {
    "reference": reference.fill,
    "cpu": cpu.fill,
    "triton": triton_kernel.fill,
    "cuda": cuda.fill,
}


def resolve(
    student_hidden,
    student_head,
    student_bias,
    teacher_hidden,
    teacher_head,
    teacher_bias,
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
    block_bytes,
    engine,
) -> tuple[Problem, str, list[Tensor]]:
    """The problem with its buffers, the engine that serves it, and the wanted gradients."""
    grads = _pairs.grad_buffers((student_hidden, student_head, student_bias), wants)
    grad_hidden, *of_vocab = grads
    grad_head, grad_bias = (_outputs.compared(grad, vocab) for grad in of_vocab)
    student_head, student_bias, teacher_head, teacher_bias = (
        None if tensor is None else tensor[:vocab]
        for tensor in (student_head, student_bias, teacher_head, teacher_bias)
    )
    problem = Problem(
        student=Side(student_hidden, student_head, student_bias),
        teacher=Side(teacher_hidden, teacher_head, teacher_bias),
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
        grad_hidden=grad_hidden,
        grad_head=grad_head,
        grad_bias=grad_bias,
        sums=coefficients.new_zeros(2),
        per_token=coefficients.new_zeros(student_hidden.shape[0], 2),
        block_bytes=block_bytes,
    )
    chosen = _engines.choose(
        "linear_kl", student_hidden.device, _outputs.dense_refusals(problem), engine
    )
    return problem, chosen, _pairs.present(grads)


def explain(*lowered) -> str:
    """The engine, the reasons against the others, and the sizes, in words."""
    problem, chosen, _ = resolve(*lowered)
    lines = _engines.describe("linear_kl", chosen, _outputs.dense_refusals(problem))
    tokens, width = problem.student.hidden.shape
    lines.append(
        f"  {tokens} tokens, {width} and {problem.teacher.hidden.shape[1]} wide, vocabulary of "
        f"{problem.student.head.shape[0]}, in blocks of tokens"
    )
    return "\n".join(lines)
