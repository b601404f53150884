"""Feature alignment in plain PyTorch: the specification, and the engine that runs anywhere."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._pairs import present, work_dtype
from .problem import Pair, Problem

_BLOCK_BYTES = 8 << 20  # of projected rows; more rows than this gains nothing on a CPU


def feature_alignment_reference(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    projection: Sequence[Tensor | None],
    bias: Sequence[Tensor | None],
    mask: Sequence[Tensor | None],
    *,
    cosine_weight: float | Tensor = 1.0,
    euclidean_weight: float | Tensor = 1.0,
    euclidean: str = "squared",
    pair_weights: Sequence[float],
    normalizer: float | Tensor | None = None,
    eps: float = 1e-8,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the loss as its formula is written; autograd gives the gradients.

    This is what users write by hand and what every engine is tested against: with float64 inputs
    it is the oracle, with others the eager baseline of tests and benchmarks. Reductions are in
    float32 at least. Every list has one entry per pair, with shapes as in `feature_alignment`.

    Returns:
        loss [], cosine [L], euclidean [L].
    """
    cosines, euclideans = [], []
    for x, t, weight, offset, rows in zip(student, teacher, projection, bias, mask, strict=True):
        t = t.detach()
        p = x
        if weight is not None:
            common = torch.promote_types(x.dtype, weight.dtype)
            p = F.linear(
                x.to(common), weight.to(common), None if offset is None else offset.to(common)
            )
        accumulate = torch.promote_types(torch.promote_types(p.dtype, t.dtype), torch.float32)
        p, t = p.to(accumulate), t.to(accumulate)
        cosine = 1 - F.cosine_similarity(p, t, dim=-1, eps=eps)
        if euclidean == "squared":
            distance = (p - t).square().mean(dim=-1)
        else:
            distance = torch.linalg.vector_norm(p - t, dim=-1)
        if rows is None:
            count = cosine.numel() if normalizer is None else normalizer
            cosine, distance = cosine.sum(), distance.sum()
        else:
            w = rows.to(cosine.dtype)
            count = w.sum() if normalizer is None else normalizer
            cosine = torch.where(w == 0, 0, w * cosine).sum()
            distance = torch.where(w == 0, 0, w * distance).sum()
        cosines.append(_divide(cosine, count))
        euclideans.append(_divide(distance, count))
    cosine, distance = torch.stack(cosines), torch.stack(euclideans)
    pairs = torch.as_tensor(pair_weights, dtype=cosine.dtype, device=cosine.device)
    loss = (pairs * (cosine_weight * cosine + euclidean_weight * distance)).sum()
    return loss, cosine, distance


def _divide(total: Tensor, count: float | Tensor) -> Tensor:
    """total / count, and 0 where nothing counts."""
    if not isinstance(count, Tensor):
        return total / count if count != 0 else total * 0
    return torch.where(count == 0, total * 0, total / torch.where(count == 0, 1, count))


def fill(problem: Problem) -> None:
    """The reference engine: blocks of rows, so that no N x Dt buffer exists.

    Runs on every device and dtype, float64 included; always on the direct route.
    """
    for tensor in (*problem.grad_projections, *problem.grad_biases):
        if tensor is not None:
            tensor.zero_()
    accumulators: dict[tuple[str, int], Tensor] = {}
    for index, pair in enumerate(problem.pairs):
        _fill_pair(problem, index, pair, accumulators)
    for (kind, index), total in accumulators.items():
        grads = problem.grad_projections if kind == "projection" else problem.grad_biases
        grads[index].copy_(total)


def _fill_pair(
    problem: Problem, index: int, pair: Pair, accumulators: dict[tuple[str, int], Tensor]
) -> None:
    work = work_dtype(present((pair.student, pair.teacher, pair.projection, pair.bias)))
    teacher_width = pair.teacher.shape[1]
    block = max(1, _BLOCK_BYTES // max(1, teacher_width * work.itemsize))
    weight = None if pair.projection is None else pair.projection.to(work)
    offset = None if pair.bias is None else pair.bias.to(work)
    coefficient = problem.coefficients[index].to(work)
    wants_projection, wants_bias = problem.wants_projection(pair), problem.wants_bias(pair)
    wants_any = pair.grad_student is not None or wants_projection or wants_bias
    total = torch.zeros(2, dtype=torch.float64, device=coefficient.device)
    for begin in range(0, pair.student.shape[0], block):
        rows = slice(begin, begin + block)
        x, t = pair.student[rows].to(work), pair.teacher[rows].to(work)
        w = x.new_ones(x.shape[0]) if pair.row_weights is None else pair.row_weights[rows].to(work)
        if pair.row_weights is not None:
            x, t = torch.where(w[:, None] == 0, 0, x), torch.where(w[:, None] == 0, 0, t)
        p = x if weight is None else F.linear(x, weight, offset)
        values, grad_p = row_terms(problem, p, t, w, coefficient if wants_any else None)
        total += values
        if grad_p is None:
            continue
        if pair.grad_student is not None:
            grad_x = grad_p if weight is None else grad_p @ weight
            if pair.row_weights is not None:
                grad_x = torch.where(w[:, None] == 0, 0, grad_x)
            pair.grad_student[rows] = grad_x
        if wants_projection:
            _add(accumulators, ("projection", pair.projection_index), grad_p.T @ x)
        if wants_bias:
            _add(accumulators, ("bias", pair.bias_index), grad_p.sum(0))
    problem.sums[index] = total


def row_terms(
    problem: Problem, p: Tensor, t: Tensor, w: Tensor, coefficient: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The row-Gram family: weighted sums [2] and the gradient dL/dp.

    Without a coefficient [2], values only.

    dL/dp = A p + B t + S (p - t). With r1 = |p|^2, r2 = p.t, r3 = |t|^2 and norms clamped at eps:
        cosine    A = g r2 / (|p|^3 |t|)    B = -g / (|p| |t|)
        squared   S = 2 g / Dt
        distance  S = g / |p - t|    (0 where p = t)

    S is kept apart from A and B because A p + B t cancels where p is close to t, and p - t does
    not. The scalars of a row are float64: their error would be shared by the whole row.
    """
    difference = p - t
    square = difference.square().sum(-1).double()
    norm_p = torch.linalg.vector_norm(p, dim=-1, dtype=torch.float64)
    norm_t = torch.linalg.vector_norm(t, dim=-1, dtype=torch.float64)
    clamped_p, clamped_t = norm_p.clamp_min(problem.eps), norm_t.clamp_min(problem.eps)
    unit_p, unit_t = (
        x * (1 / norm).to(x.dtype)[:, None] for x, norm in ((p, clamped_p), (t, clamped_t))
    )
    cosine = (unit_p * unit_t).sum(-1).double()
    # Where p is close to t, 1 - cos from small numbers, not as a difference of large ones.
    is_close = (square < 0.25 * (norm_p.square() + norm_t.square())) & (norm_t >= problem.eps)
    close = 0.5 * (square - (norm_p - norm_t).square()) / clamped_p / clamped_t
    distance_of_cosine = torch.where(is_close & (norm_p >= problem.eps), close, 1 - cosine)
    euclidean = square / p.shape[1] if problem.is_squared else square.sqrt()
    values = torch.stack([w * distance_of_cosine, w * euclidean])
    values = torch.where(w != 0, values, 0).sum(1)
    if coefficient is None:
        return values, None
    g = (coefficient[:, None] * w).double()
    along_p = torch.where(norm_p < problem.eps, 0, g[0] * cosine / clamped_p / clamped_p)
    along_t = -g[0] / clamped_p / clamped_t
    if problem.is_squared:
        slope = (2 / p.shape[1]) * g[1]
    else:
        slope = torch.where(euclidean == 0, 0, g[1] / euclidean)
    grad_p = (
        along_p.to(p.dtype)[:, None] * p
        + along_t.to(p.dtype)[:, None] * t
        + slope.to(p.dtype)[:, None] * difference
    )
    return values, grad_p


def _add(accumulators: dict, key: tuple[str, int], term: Tensor) -> None:
    if key in accumulators:
        accumulators[key] += term
    else:
        accumulators[key] = term
