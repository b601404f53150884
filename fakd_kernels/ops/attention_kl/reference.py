"""Attention alignment in plain PyTorch: the specification, and the engine that runs anywhere."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._attention import allowed_keys, distance_of, log_mean, score_gradient
from .problem import Pair, Problem, Side

_BLOCK_BYTES = 32 << 20  # of the scores of one side of a block of query rows


def attention_kl_reference(
    student_q: Sequence[Tensor],
    student_k: Sequence[Tensor],
    teacher_q: Sequence[Tensor],
    teacher_k: Sequence[Tensor],
    mask: Sequence[Tensor | None],
    *,
    causal: bool | Sequence[bool] = False,
    window: int | Sequence[int | None] | None = None,
    student_scale: float | Sequence[float | None] | None = None,
    teacher_scale: float | Sequence[float | None] | None = None,
    student_softcap: float | Sequence[float | None] | None = None,
    teacher_softcap: float | Sequence[float | None] | None = None,
    temperature: float = 1.0,
    heads: str | Sequence[int] = "match",
    distance: str = "kl",
    weight: float | Tensor = 1.0,
    pair_weights: Sequence[float],
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Compute the loss as its formula is written, maps and all; autograd gives the gradients.

    With float64 inputs it is the oracle of the tests, with others the eager baseline of tests and
    benchmarks. Softmax and reductions are in float32 at least. Shapes as in `attention_kl`.

    Returns:
        loss [], per_pair [L], per_head (a list of [H], of [1] where heads are averaged).
    """
    per_pair, per_head = [], []
    count = len(student_q)

    def apart(values) -> list:
        return list(values) if isinstance(values, (list, tuple)) else [values] * count

    for sq, sk, tq, tk, rows, *options in zip(
        student_q,
        student_k,
        teacher_q,
        teacher_k,
        mask,
        *map(apart, (causal, window)),
        *map(apart, (student_scale, teacher_scale, student_softcap, teacher_softcap)),
        strict=True,
    ):
        is_causal, keys_within, s_scale, t_scale, s_cap, t_cap = options
        batch, _, tokens, _ = sq.shape
        w = torch.ones(batch, tokens, device=sq.device) if rows is None else rows
        allowed = allowed_keys(w, is_causal, keys_within)
        student = _log_maps(sq, sk, allowed, s_scale, s_cap, temperature)
        teacher = _log_maps(tq.detach(), tk.detach(), allowed, t_scale, t_cap, temperature)
        if heads == "mean":
            student, teacher = (log_mean(maps, allowed) for maps in (student, teacher))
        elif heads != "match":
            teacher = teacher[:, list(heads)]
        rows_apart = distance_of(student, teacher, allowed, distance)  # [B, H, T]
        w = w.to(rows_apart.dtype)[:, None]
        total = torch.where(w == 0, 0, w * rows_apart).sum((0, 2))  # [H]
        count = w.sum() if normalizer is None else torch.as_tensor(normalizer) / total.numel()
        mean = torch.where(count == 0, total * 0, total / torch.where(count == 0, 1, count))
        per_head.append(mean)
        per_pair.append(mean.mean())
    per_pair = torch.stack(per_pair)
    pairs = torch.as_tensor(pair_weights, dtype=per_pair.dtype, device=per_pair.device)
    return weight * (pairs * per_pair).sum(), per_pair, per_head


def _log_maps(q, k, allowed, scale, softcap, temperature) -> Tensor:
    """Logarithms of attention probabilities, 0 at keys that are not allowed: [B, H, T, T]."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q @ k.mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = (scores / temperature).masked_fill(~allowed, -torch.inf)
    return torch.log_softmax(scores, -1).masked_fill(~allowed, 0)


def fill(problem: Problem) -> None:
    """The reference engine: blocks of query rows, so that no T x T map exists.

    Runs on every device and dtype, float64 included. Causal and windowed blocks are trimmed.
    """
    for index, pair in enumerate(problem.pairs):
        _fill_pair(problem, pair, problem.coefficients[index])


def _fill_pair(problem: Problem, pair: Pair, coefficient: Tensor) -> None:
    work = coefficient.dtype
    batch, heads, tokens, _ = pair.student.q.shape
    student_k, teacher_k = pair.student.k.to(work), pair.teacher.k.to(work)
    weights = pair.row_weights
    if weights is None:
        weights = torch.ones(batch, tokens, device=coefficient.device)
    weights = weights.to(work)
    wants_any = pair.grad_q is not None or pair.grad_k is not None
    grad_k = torch.zeros_like(student_k) if pair.grad_k is not None else None
    most_heads = max(heads, pair.teacher.q.shape[1])
    block = max(1, _BLOCK_BYTES // max(1, batch * most_heads * tokens * work.itemsize))
    for begin in range(0, tokens, block):
        end = min(tokens, begin + block)
        first, last = pair.key_range(begin, end)
        rows, keys = slice(begin, end), slice(first, last)
        allowed = allowed_keys(weights, pair.is_causal, pair.window, (begin, end), (first, last))
        q = pair.student.q[:, :, rows].to(work)
        slope, student = _log_rows(q, student_k[:, :, keys], allowed, pair.student, problem)
        tq = pair.teacher.q[:, :, rows].to(work)
        _, teacher = _log_rows(tq, teacher_k[:, :, keys], allowed, pair.teacher, problem)
        maps = student
        if pair.teacher_heads is None:
            maps, teacher = log_mean(student, allowed), log_mean(teacher, allowed)
        else:
            teacher = teacher[:, pair.teacher_heads]
        w = weights[:, None, rows]
        values = distance_of(maps, teacher, allowed, problem.distance)
        pair.sums.add_(torch.where(w == 0, 0, w * values).sum((0, 2)).to(pair.sums.dtype))
        if not wants_any:
            continue
        grad = score_gradient(student, maps, teacher, allowed, problem.distance)
        grad = torch.where(w[..., None] == 0, 0, grad * (w * coefficient)[..., None]) * slope
        grouped = grad.unflatten(1, (student_k.shape[1], -1))  # [B, Hkv, G, R, J]
        if pair.grad_q is not None:
            grad_q = grouped @ student_k[:, :, None, keys]
            pair.grad_q[:, :, rows] = grad_q.flatten(1, 2).to(pair.grad_q.dtype)
        if grad_k is not None:
            q = q.unflatten(1, (student_k.shape[1], -1))
            grad_k[:, :, keys] += (grouped.mT @ q).sum(2)
    if grad_k is not None:
        pair.grad_k.copy_(grad_k)


def _log_rows(
    q: Tensor, k: Tensor, allowed: Tensor, side: Side, problem: Problem
) -> tuple[Tensor | float, Tensor]:
    """The slope of scores by q.k, and the logarithms of the maps, [B, H, R, J]."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q @ k.mT) * side.scale
    slope: Tensor | float = side.scale / problem.temperature
    if side.softcap is not None:
        capped = torch.tanh(scores / side.softcap)
        scores = side.softcap * capped
        slope = slope * (1 - capped.square())
    scores = (scores / problem.temperature).masked_fill(~allowed, -torch.inf)
    return slope, torch.log_softmax(scores, -1).masked_fill(~allowed, 0)
