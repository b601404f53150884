"""From the registered op's arguments to the engine that serves them: the one place that decides."""

import torch
from torch import Tensor

from ... import _engines, _pairs
from ..._attention import heads_compared, zero_sums
from . import cpu, cuda, reference, triton_kernel
from .problem import Pair, Problem

FILL = {
    "reference": reference.fill,
    "cpu": cpu.fill,
    "triton": triton_kernel.fill,
    "cuda": cuda.fill,
}


def resolve(
    student_maps,
    teacher_maps,
    row_weights,
    coefficients,
    row_weights_of,
    wants,
    causal,
    window,
    are_scores,
    temperature,
    teacher_heads,
    distance,
    engine,
) -> tuple[Problem, str, list[Tensor]]:
    """The problem with its buffers, the engine that serves it, and the wanted gradients."""
    grads = _pairs.grad_buffers(student_maps, wants)
    sizes = [heads_compared(tensor, teacher_heads) for tensor in student_maps]
    sums, sums_of = zero_sums(sizes, coefficients)
    pairs = []
    begin = 0
    for index, maps in enumerate(student_maps):
        compared = sizes[index]
        pairs.append(
            Pair(
                student=maps,
                teacher=teacher_maps[index],
                row_weights=_pairs.pick(row_weights, row_weights_of[index]),
                is_causal=causal[index],
                window=None if window[index] < 0 else window[index],
                teacher_heads=teacher_heads[begin : begin + compared] if teacher_heads else None,
                grad=grads[index],
                sums=sums_of[index],
            )
        )
        begin += compared
    problem = Problem(pairs, coefficients, sums, are_scores, temperature, distance)
    device = student_maps[0].device
    chosen = _engines.choose("attention_map_kl", device, refusals(problem), engine)
    return problem, chosen, _pairs.present(grads)


def refusals(problem: Problem) -> _engines.Refusals:
    """Why each engine cannot serve this call, None where it can."""
    coefficients = problem.coefficients
    place = coefficients.device, coefficients.dtype == torch.float64
    return {
        "reference": None,
        "cpu": _engines.cpu_refusal(*place),
        "triton": _engines.triton_refusal(*place),
        "cuda": cuda.refusal(problem) or _engines.cuda_refusal(*place),
    }


def explain(*lowered) -> str:
    """The engine, the reasons against the others, and the size of every pair, in words."""
    problem, chosen, _ = resolve(*lowered)
    lines = _engines.describe("attention_map_kl", chosen, refusals(problem))
    for index, pair in enumerate(problem.pairs):
        batch, heads, tokens, _ = pair.student.shape
        lines.append(f"  pair {index}: {batch} x {heads} maps of {tokens} x {tokens}, row by row")
    return "\n".join(lines)
