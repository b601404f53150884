"""From the registered op's arguments to the engine that serves them: the one place that decides."""

import torch
from torch import Tensor

from ... import _engines, _extension
from ..._pairs import grad_buffers, pick, present
from . import cpu, cuda, projected, reference, triton_kernel
from .problem import Pair, Problem, choose_route, count_flops


def resolve(
    student,
    teacher,
    projections,
    biases,
    row_weights,
    coefficients,
    projection_of,
    bias_of,
    row_weights_of,
    wants_student,
    wants_projection,
    wants_bias,
    eps,
    euclidean,
    route,
    engine,
) -> tuple[Problem, str, list[Tensor]]:
    """The problem with its buffers, the engine that serves it, and the wanted gradients."""
    grad_student = grad_buffers(student, wants_student)
    grad_projections = grad_buffers(projections, wants_projection)
    grad_biases = grad_buffers(biases, wants_bias)
    pairs = [
        Pair(
            student=x,
            teacher=t,
            projection=pick(projections, projection_of[index]),
            bias=pick(biases, bias_of[index]),
            row_weights=pick(row_weights, row_weights_of[index]),
            grad_student=grad_student[index],
            projection_index=projection_of[index],
            bias_index=bias_of[index],
            route=_route(
                route,
                x,
                t,
                pick(projections, projection_of[index]),
                wants_student[index],
                projection_of[index] >= 0 and wants_projection[projection_of[index]],
            ),
        )
        for index, (x, t) in enumerate(zip(student, teacher, strict=True))
    ]
    problem = Problem(
        pairs,
        coefficients,
        torch.zeros_like(coefficients),
        grad_projections,
        grad_biases,
        euclidean == "squared",
        eps,
        is_route_forced=route != "auto",
    )
    place = student[0].device
    chosen = _engines.choose("feature_alignment", place, refusals(problem), engine)
    return problem, chosen, present(grad_student, grad_projections, grad_biases)


def _route(
    route: str,
    student: Tensor,
    teacher: Tensor,
    projection: Tensor | None,
    wants_student: bool,
    wants_projection: bool,
) -> str:
    if projection is None:
        return "none"
    if route == "auto":
        dtypes = {student.dtype, projection.dtype}
        if dtypes == {torch.bfloat16} and _extension.has_bfloat16_products(student.device):
            return "direct"  # all of its products are bfloat16; the gram route's are not
        if student.device.type == "cuda":
            return "direct"  # see `projected`
    widths = student.shape[1], teacher.shape[1]
    return choose_route(route, student.shape[0], *widths, wants_student, wants_projection)


FILL = {
    "reference": reference.fill,
    "cpu": cpu.fill,
    "triton": triton_kernel.fill,
    "cuda": cuda.fill,
}


def refusals(problem: Problem) -> _engines.Refusals:
    """Why each engine cannot serve this call, None where it can."""
    tensors = [
        tensor
        for pair in problem.pairs
        for tensor in (pair.student, pair.teacher, pair.projection, pair.bias)
        if tensor is not None
    ]
    device = tensors[0].device
    is_double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return {
        "reference": None,
        "cpu": _engines.cpu_refusal(device, is_double),
        "triton": projected.refusal(problem) or _engines.triton_refusal(device, is_double),
        "cuda": projected.refusal(problem) or _engines.cuda_refusal(device, is_double),
    }


def explain(*lowered) -> str:
    """The engine, the reasons against the others, the route of every pair, and the launches."""
    problem, chosen, _ = resolve(*lowered)
    lines = _engines.describe("feature_alignment", chosen, refusals(problem))
    for index, pair in enumerate(problem.pairs):
        shape = f"  pair {index}: {pair.student.shape[0]} rows, "
        if pair.projection is None:
            lines.append(shape + f"{pair.student.shape[1]} wide, one pass without a projection")
            continue
        flops = count_flops(
            *pair.student.shape,
            pair.teacher.shape[1],
            pair.grad_student is not None,
            problem.wants_projection(pair),
        )
        route = pair.route if chosen == "cpu" else "direct"
        lines.append(
            shape + f"{pair.student.shape[1]} to {pair.teacher.shape[1]} wide, {route} route "
            f"(direct {flops['direct'] / 1e9:.3g}, gram {flops['gram'] / 1e9:.3g} GFLOP)"
        )
    if chosen == "triton":
        lines += [f"  {words}" for words in triton_kernel.describe(problem)]
    if chosen == "cuda":
        lines += [f"  {words}" for words in cuda.describe(problem)]
    return "\n".join(lines)
