"""Alignment of attention maps in plain PyTorch: the specification and the engine of any device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._attention import allowed_keys, distance_of, log_mean, score_gradient
from .problem import LEAST, Pair, Problem

_EXCLUDED = -1e30  # the logarithm of a probability of 0: differences must exist
_BLOCK_BYTES = 32 << 20  # of a block of query rows, in the dtype of the arithmetic


def attention_map_kl_reference(
    student_maps: Sequence[Tensor],
    teacher_maps: Sequence[Tensor],
    mask: Sequence[Tensor | None],
    *,
    causal: bool = False,
    window: int | None = None,
    inputs: str = "probabilities",
    temperature: float = 1.0,
    heads: str | Sequence[int] = "match",
    distance: str = "kl",
    weight: float | Tensor = 1.0,
    pair_weights: Sequence[float],
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Compute the loss as its formula is written; autograd gives the gradients.

    With float64 inputs it is the oracle of the tests, with others the eager baseline of tests and
    benchmarks. Arithmetic is in float32 at least. Shapes as in `attention_map_kl`.

    Returns:
        loss [], per_pair [L], per_head (a list of [H], of [1] where heads are averaged).
    """
    per_pair, per_head = [], []
    for student, teacher, rows in zip(student_maps, teacher_maps, mask, strict=True):
        batch, _, tokens, _ = student.shape
        w = torch.ones(batch, tokens, device=student.device) if rows is None else rows
        allowed = allowed_keys(w, causal, window)
        are_scores, is_mean = inputs == "scores", heads == "mean"
        student = _log_maps(student, allowed, are_scores, temperature, is_mean)
        teacher = _log_maps(teacher.detach(), allowed, are_scores, temperature, is_mean)
        if heads not in ("match", "mean"):
            teacher = teacher[:, list(heads)]
        apart = distance_of(student, teacher, allowed, distance)  # [B, H, T]
        w = w.to(apart.dtype)[:, None]
        total = torch.where(w == 0, 0, w * apart).sum((0, 2))  # [H]
        count = w.sum() if normalizer is None else torch.as_tensor(normalizer) / total.numel()
        mean = torch.where(count == 0, total * 0, total / torch.where(count == 0, 1, count))
        per_head.append(mean)
        per_pair.append(mean.mean())
    per_pair = torch.stack(per_pair)
    pairs = torch.as_tensor(pair_weights, dtype=per_pair.dtype, device=per_pair.device)
    return weight * (pairs * per_pair).sum(), per_pair, per_head


def _log_maps(
    maps: Tensor, allowed: Tensor, are_scores: bool, temperature: float, is_mean: bool
) -> Tensor:
    """Logarithms of probabilities, of their mean over heads where `is_mean`, 0 where masked."""
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    if not are_scores:
        maps = maps.mean(1, keepdim=True) if is_mean else maps
        return maps.clamp_min(LEAST).log().masked_fill(~allowed, 0)
    logs = torch.log_softmax((maps / temperature).masked_fill(~allowed, -torch.inf), -1)
    logs = logs.clamp_min(_EXCLUDED).masked_fill(~allowed, 0)
    return log_mean(logs, allowed) if is_mean else logs


def fill(problem: Problem) -> None:
    """The reference engine: blocks of query rows; every device and dtype, float64 included."""
    for index, pair in enumerate(problem.pairs):
        _fill_pair(problem, pair, problem.coefficients[index])


def _fill_pair(problem: Problem, pair: Pair, coefficient: Tensor) -> None:
    work = coefficient.dtype
    batch, heads, tokens, _ = pair.student.shape
    is_mean = pair.teacher_heads is None
    weights = pair.row_weights
    if weights is None:
        weights = torch.ones(batch, tokens, device=coefficient.device)
    weights = weights.to(work)
    if pair.grad is not None:
        pair.grad.zero_()
    most_heads = max(1, heads, pair.teacher.shape[1])
    block = max(1, _BLOCK_BYTES // max(1, batch * most_heads * tokens * work.itemsize))
    for begin in range(0, tokens, block):
        end = min(tokens, begin + block)
        first, last = pair.key_range(begin, end)
        rows, keys = slice(begin, end), slice(first, last)
        allowed = allowed_keys(weights, pair.is_causal, pair.window, (begin, end), (first, last))
        student = pair.student[:, :, rows, keys].to(work)
        teacher = pair.teacher[:, :, rows, keys].to(work)
        options = (allowed, problem.are_scores, problem.temperature)
        maps = _log_maps(student, *options, is_mean)
        teacher = _log_maps(teacher, *options, is_mean)
        if not is_mean:
            teacher = teacher[:, pair.teacher_heads]
        w = weights[:, None, rows]
        values = distance_of(maps, teacher, allowed, problem.distance)
        pair.sums.add_(torch.where(w == 0, 0, w * values).sum((0, 2)).to(pair.sums.dtype))
        if pair.grad is None:
            continue
        if problem.are_scores:
            logs = _log_maps(student, *options, False) if is_mean else maps
            grad = score_gradient(logs, maps, teacher, allowed, problem.distance)
            grad = grad / problem.temperature
        else:
            p = student.mean(1, keepdim=True) if is_mean else student
            t = pair.teacher[:, :, rows, keys].to(work)
            t = t.mean(1, keepdim=True) if is_mean else t[:, pair.teacher_heads]
            grad = _map_gradient(p.clamp_min(LEAST), t.clamp_min(LEAST), problem.distance)
            grad = torch.where(allowed & (p >= LEAST), grad, 0) / (heads if is_mean else 1)
        grad = torch.where(w[..., None] == 0, 0, grad * (w * coefficient)[..., None])
        pair.grad[:, :, rows, keys] = grad.expand(student.shape).to(pair.grad.dtype)


def _map_gradient(student: Tensor, teacher: Tensor, distance: str) -> Tensor:
    """d distance / d student, of probabilities."""
    if distance == "kl":
        return -teacher / student
    if distance == "reverse_kl":
        return student.log() - teacher.log() + 1
    if distance == "mse":
        return 2 * (student - teacher)
    return (student.log() - (student / 2 + teacher / 2).log()) / 2
