"""From the registered op's arguments to the engine that serves them: the one place that decides."""

from torch import Tensor

from ... import _engines, _outputs, _pairs
from . import cpu, reference, triton_kernel
from .problem import Problem

FILL = {"reference": reference.fill, "cpu": cpu.fill, "triton": triton_kernel.fill}


def resolve(
    hidden,
    head,
    bias,
    indices,
    logprobs,
    labels,
    row_weights,
    coefficients,
    wants,
    temperature,
    student_softcap,
    has_ghost,
    block_bytes,
    engine,
) -> tuple[Problem, str, list[Tensor]]:
    """The problem with its buffers, the engine that serves it, and the wanted gradients."""
    grads = _pairs.grad_buffers((hidden, head, bias), wants)
    problem = Problem(
        hidden=hidden,
        head=head,
        bias=bias,
        indices=indices,
        logprobs=logprobs,
        has_ghost=has_ghost,
        terms=_outputs.Terms(
            labels, row_weights, coefficients, temperature, student_softcap or None
        ),
        grad_hidden=grads[0],
        grad_head=grads[1],
        grad_bias=grads[2],
        sums=coefficients.new_zeros(2),
        per_token=coefficients.new_zeros(hidden.shape[0], 2),
        block_bytes=block_bytes,
    )
    chosen = _engines.choose("topk_kl", hidden.device, refusals(problem), engine)
    return problem, chosen, _pairs.present(grads)


def refusals(problem: Problem) -> _engines.Refusals:
    """Why each engine cannot serve this call, None where it can."""
    reasons, entries = _outputs.refusals(problem), problem.indices.shape[1]
    if reasons["triton"] is None and entries > triton_kernel.MOST_ENTRIES:
        most = triton_kernel.MOST_ENTRIES
        reasons["triton"] = f"it serves up to {most} entries per token: got {entries}"
    return reasons


def explain(*lowered) -> str:
    """The engine, the reasons against the others, and the sizes, in words."""
    problem, chosen, _ = resolve(*lowered)
    lines = _engines.describe("topk_kl", chosen, refusals(problem))
    tokens, width = problem.hidden.shape
    ghost = " and a ghost" if problem.has_ghost else ""
    lines.append(
        f"  {tokens} tokens, {width} wide, {problem.indices.shape[1]} entries{ghost} of a "
        f"vocabulary of {problem.head.shape[0]}, in blocks of tokens"
    )
    return "\n".join(lines)
