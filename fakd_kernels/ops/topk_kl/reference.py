"""Alignment with stored log-probabilities in plain PyTorch: the specification, and the engine that
runs anywhere."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _output_rows as rows_of
from .problem import Problem

_BLOCK_BYTES = 32 << 20  # of float32 logits, or of the gathered rows of the head


def topk_kl_reference(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_indices: Tensor,
    teacher_logprobs: Tensor,
    *,
    student_bias: Tensor | None = None,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    student_softcap: float | None = None,
    ghost: bool = False,
    **weights,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the loss as its formula is written, logits and all; autograd gives the gradients.

    With float64 inputs it is the oracle of the tests, with others the eager baseline of tests and
    benchmarks: logits in the dtype of their inputs, as models make them, then float32 at least.
    Arguments as in `topk_kl`.

    Returns:
        loss [], kl [], ce [], per_token [N], tokens [].
    """
    logits = rows_of.to_work(rows_of.linear_reference(student_hidden, student_head, student_bias))
    logits, _ = rows_of.cap(logits, student_softcap)
    indices = teacher_indices.flatten(0, -2).long()
    logprobs = teacher_logprobs.detach().flatten(0, -2).to(logits.dtype)
    support = logits.gather(1, indices.clamp_min(0))
    others = _others(logits, indices) if ghost else None
    logs = _outcomes(support, indices, logprobs, temperature, others).logs()
    distance = rows_of.kl(logs.teacher, logs.student)
    ce = rows_of.cross_entropy(torch.log_softmax(logits, -1), labels)
    return rows_of.mean_reference(distance, ce, labels, mask, temperature=temperature, **weights)


class _Others(NamedTuple):
    """The tokens that are not stored."""

    are_any: Tensor  # [R, 1] bool
    is_other: Tensor  # [R, V] bool; where there are none, all
    score: Tensor  # [R, 1]: the log-sum-exp of their logits


def _others(logits: Tensor, indices: Tensor) -> _Others:
    tokens, vocab = logits.shape
    is_used = indices >= 0
    # Unused entries go to a column of their own.
    is_stored = torch.zeros(tokens, vocab + 1, dtype=torch.bool, device=logits.device)
    is_stored.scatter_(1, torch.where(is_used, indices, vocab), True)
    are_any = is_used.sum(1, keepdim=True) < vocab
    is_other = ~(is_stored[:, :vocab] & are_any)
    score = logits.masked_fill(~is_other, -torch.inf).logsumexp(1, keepdim=True)
    return _Others(are_any, is_other, score)


def _outcomes(
    support: Tensor,
    indices: Tensor,
    logprobs: Tensor,
    temperature: float,
    others: _Others | None,
) -> rows_of.Scores:
    """See `Problem`: [R, k], or [R, k + 1] with the ghost last.

    `support` [R, k] holds the capped logits at `indices`.
    """
    is_used = indices >= 0
    student = (support / temperature).masked_fill(~is_used, -torch.inf)
    teacher = (logprobs / temperature).masked_fill(~is_used, -torch.inf)
    if others is None:
        is_empty = ~is_used.any(1, keepdim=True)
        # All outcomes alike: 0 and no gradient, where the softmax of none would be NaN.
        student, teacher = (scores.masked_fill(is_empty, 0) for scores in (student, teacher))
    else:
        rest = (1 - teacher.exp().sum(1, keepdim=True)).clamp_min(0).log()
        ghosts = (
            scores.masked_fill(~others.are_any, -torch.inf) for scores in (others.score, rest)
        )
        student, teacher = (
            torch.cat(parts, 1) for parts in zip((student, teacher), ghosts, strict=True)
        )
    return rows_of.Scores(student, teacher)


def fill(problem: Problem) -> None:
    """The reference engine: blocks of tokens, so that no N x V logits exist.

    Runs on every device and dtype, float64 included. Where neither a ghost nor a cross-entropy
    asks for all logits, only those at the stored indices are computed.
    """
    terms, work = problem.terms, problem.terms.coefficients.dtype
    gradients = rows_of.ProjectionGradients(
        problem.grad_hidden, problem.grad_head, problem.grad_bias, work
    )
    needs_all = problem.has_ghost or terms.labels is not None
    block = _dense_block if needs_all else _sparse_block
    head, bias = problem.head, problem.bias
    if needs_all:
        head, bias = head.to(work), None if bias is None else bias.to(work)
    columns = len(head) if needs_all else problem.indices.shape[1] * head.shape[1]
    budget = problem.block_bytes or _BLOCK_BYTES
    for rows in rows_of.blocks(problem.per_token, columns, budget):
        weights = terms.weights(rows)
        x = rows_of.counted(problem.hidden[rows].to(work), weights)
        block(problem, x, head, bias, rows, gradients)
    gradients.finish()
    rows_of.fill_sums(problem.sums, terms, problem.per_token)


def _stored(problem: Problem, rows: slice) -> tuple[Tensor, Tensor]:
    """Indices and log-probabilities; of rows that do not count, none."""
    indices, logprobs = problem.indices[rows], problem.logprobs[rows]
    if problem.terms.row_weights is not None:
        indices = torch.where(problem.terms.row_weights[rows, None] == 0, -1, indices)
    return indices, logprobs


def _by_score(problem: Problem, scores: rows_of.Scores, rows: slice) -> Tensor:
    """Fills the distances of a block; returns the gradient of the loss by the student's scores,
    over the temperature, [R, k] or [R, k + 1]."""
    terms, logs = problem.terms, scores.logs()
    problem.per_token[rows, 0] = rows_of.kl(logs.teacher, logs.student)
    kl_gain, _ = rows_of.gains(terms, rows)
    gradient = rows_of.distance_gradient(scores, logs, terms.distance, terms.jsd_beta)
    return gradient.mul_(kl_gain / terms.temperature)


def _dense_block(problem, x, head, bias, rows, gradients) -> None:
    """All logits of a block, [R, V]."""
    terms = problem.terms
    logits, slope = rows_of.cap(F.linear(x, head, bias), terms.student_softcap)
    indices, logprobs = _stored(problem, rows)
    places = indices.clamp_min(0)
    others = _others(logits, indices) if problem.has_ghost else None
    scores = _outcomes(logits.gather(1, places), indices, logprobs, terms.temperature, others)
    by_score = _by_score(problem, scores, rows)
    grad = None
    if gradients.is_wanted:
        grad = torch.zeros_like(logits)
        if others is not None:
            shares = (logits - others.score).exp().masked_fill(~others.is_other, 0)
            ghost = by_score[:, -1:]
            grad = torch.where(ghost == 0, 0, ghost * shares)
        stored = by_score[:, : indices.shape[1]].masked_fill(indices < 0, 0)
        grad.scatter_add_(1, places, stored)
    if terms.labels is not None:
        rows_of.add_ce(grad, torch.log_softmax(logits, -1), terms, rows, problem.per_token)
    if grad is not None:
        gradients.add(grad if slope is None else grad.mul_(slope), x, head, rows)


def _sparse_block(problem, x, head, bias, rows, gradients) -> None:
    """The logits at the stored indices, [R, k]."""
    terms = problem.terms
    indices, logprobs = _stored(problem, rows)
    places = indices.clamp_min(0)
    heads = head[places].to(x.dtype)  # [R, k, D]
    logits = (heads @ x[:, :, None]).squeeze(2)
    if bias is not None:
        logits = logits + bias[places]
    support, slope = rows_of.cap(logits, terms.student_softcap)
    scores = _outcomes(support, indices, logprobs, terms.temperature, None)
    grad = _by_score(problem, scores, rows).masked_fill(indices < 0, 0)
    if gradients.is_wanted:
        gradients.add_gathered(grad if slope is None else grad * slope, x, heads, places, rows)
