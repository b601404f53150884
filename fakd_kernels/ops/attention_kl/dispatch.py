"""From the registered op's arguments to the engine that serves them: the one place that decides."""

import torch
from torch import Tensor

from ... import _engines, _pairs
from ..._attention import heads_compared, zero_sums
from . import cpu, reference, triton_kernel
from .problem import Pair, Problem, Side

FILL = {"reference": reference.fill, "cpu": cpu.fill, "triton": triton_kernel.fill}


def resolve(
    student_q,
    student_k,
    teacher_q,
    teacher_k,
    row_weights,
    coefficients,
    row_weights_of,
    wants_q,
    wants_k,
    student_scale,
    teacher_scale,
    student_softcap,
    teacher_softcap,
    causal,
    window,
    temperature,
    teacher_heads,
    distance,
    engine,
) -> tuple[Problem, str, list[Tensor]]:
    """The problem with its buffers, the engine that serves it, and the wanted gradients."""
    grad_q = _pairs.grad_buffers(student_q, wants_q)
    grad_k = _pairs.grad_buffers(student_k, wants_k)
    sizes = [heads_compared(tensor, teacher_heads) for tensor in student_q]
    sums, sums_of = zero_sums(sizes, coefficients)
    pairs = []
    begin = 0
    for index, q in enumerate(student_q):
        compared = sizes[index]
        pairs.append(
            Pair(
                student=Side(
                    q, student_k[index], student_scale[index], student_softcap[index] or None
                ),
                teacher=Side(
                    teacher_q[index],
                    teacher_k[index],
                    teacher_scale[index],
                    teacher_softcap[index] or None,
                ),
                row_weights=_pairs.pick(row_weights, row_weights_of[index]),
                is_causal=causal[index],
                window=None if window[index] < 0 else window[index],
                teacher_heads=teacher_heads[begin : begin + compared] if teacher_heads else None,
                grad_q=grad_q[index],
                grad_k=grad_k[index],
                sums=sums_of[index],
            )
        )
        begin += compared
    problem = Problem(pairs, coefficients, sums, temperature, distance)
    chosen = _engines.choose("attention_kl", student_q[0].device, refusals(problem), engine)
    return problem, chosen, _pairs.present(grad_q, grad_k)


def refusals(problem: Problem) -> _engines.Refusals:
    """Why each engine cannot serve this call, None where it can."""
    device, is_double = problem.coefficients.device, problem.coefficients.dtype == torch.float64
    return {
        "reference": None,
        "cpu": _engines.cpu_refusal(device, is_double),
        "triton": _engines.triton_refusal(device, is_double) or _triton_refusal(problem),
    }


def _triton_refusal(problem: Problem) -> str | None:
    sides = [side for pair in problem.pairs for side in (pair.student, pair.teacher)]
    if (widest := max(side.q.shape[-1] for side in sides)) > triton_kernel.WIDEST_HEAD:
        return f"it serves heads up to {triton_kernel.WIDEST_HEAD} wide: got {widest}"
    if any(side.q.dtype != side.k.dtype for side in sides):
        return "it serves queries and keys of one dtype on each side"
    return None


def explain(*lowered) -> str:
    """The engine, the reasons against the others, and the size of every pair, in words."""
    problem, chosen, _ = resolve(*lowered)
    lines = _engines.describe("attention_kl", chosen, refusals(problem))
    for index, pair in enumerate(problem.pairs):
        batch, heads, tokens, width = pair.student.q.shape
        lines.append(
            f"  pair {index}: {batch} x {heads} heads x {tokens} tokens, {width} and "
            f"{pair.teacher.q.shape[-1]} wide, in blocks of query rows"
        )
    return "\n".join(lines)
