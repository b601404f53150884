"""Rows of logits in plain PyTorch: distances, cross-entropy and their gradients.

The specification that the ops on outputs share, and the arithmetic of their reference engines.
Logarithms of probabilities throughout; an entry of probability 0 (a logit of -inf) adds 0 to a sum
that it weighs.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._outputs import Terms


def mean_reference(
    distance: Tensor,
    ce: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    *,
    kl_weight: float | Tensor = 1.0,
    ce_weight: float | Tensor = 0.0,
    ignore_index: int = -100,
    temperature: float = 1.0,
    scale_by_temperature_squared: bool = True,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `OutputKL` from both values of every token, [N]; autograd passes through."""
    w = torch.ones_like(distance) if mask is None else mask.reshape(-1).to(distance.dtype)
    if labels is not None:
        w = torch.where(labels.reshape(-1) == ignore_index, 0, w)
    tokens = w.sum()
    count = tokens if normalizer is None else torch.as_tensor(normalizer)
    inverse = torch.where(count == 0, 0, 1 / torch.where(count == 0, 1, count))
    factor = kl_weight * (temperature**2 if scale_by_temperature_squared else 1.0)
    kl_mean, ce_mean = (
        torch.where(w == 0, 0, w * values).sum() * inverse for values in (distance, ce)
    )
    per_token = torch.where(w == 0, 0, factor * distance + ce_weight * ce)
    return factor * kl_mean + ce_weight * ce_mean, kl_mean, ce_mean, per_token, tokens


def linear_reference(hidden: Tensor, head: Tensor, bias: Tensor | None) -> Tensor:
    """Logits [N, V] as a model computes them, in the widest dtype of its inputs."""
    common = torch.promote_types(hidden.dtype, head.dtype)
    offset = None if bias is None else bias.to(common)
    return F.linear(hidden.flatten(0, -2).to(common), head.to(common), offset)


def dense_reference(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    *,
    temperature: float = 1.0,
    distance: str = "kl",
    jsd_beta: float = 0.5,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    vocab: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The distance and the cross-entropy of every token, [N] each, from logits [N, V]."""
    student, teacher = to_work(student), to_work(teacher.detach())
    if vocab == "prefix":
        shared = min(student.shape[1], teacher.shape[1])
        student, teacher = student[:, :shared], teacher[:, :shared]
    student, _ = cap(student, student_softcap)
    teacher, _ = cap(teacher, teacher_softcap)
    logs = Scores(student / temperature, teacher / temperature).logs()
    ce = cross_entropy(torch.log_softmax(student, -1), labels)
    return distances(*logs, distance, jsd_beta), ce


def to_work(logits: Tensor) -> Tensor:
    """float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def cap(logits: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """softcap * tanh(logits / softcap), and its slope; both are trivial without a cap."""
    if softcap is None:
        return logits, None
    ratio = torch.tanh(logits / softcap)
    return softcap * ratio, 1 - ratio.square()


def cross_entropy(log_student: Tensor, labels: Tensor | None) -> Tensor:
    """[N]; labels outside the vocabulary belong to rows that do not count."""
    if labels is None:
        return torch.zeros_like(log_student[:, 0])
    return -log_student.gather(1, _places(log_student, labels)).squeeze(1)


def _places(rows: Tensor, labels: Tensor) -> Tensor:
    return labels.reshape(-1, 1).clamp(0, rows.shape[1] - 1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of rows given by their logarithms, [N]."""
    probability = p.exp()
    return (probability * (p - q).masked_fill(probability == 0, 0)).sum(-1)


def _middle(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """log(beta T + (1 - beta) S): the sum itself would underflow."""
    return torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))


def distances(student: Tensor, teacher: Tensor, distance: str, beta: float) -> Tensor:
    """[N]"""
    if distance == "kl":
        return kl(teacher, student)
    if distance == "reverse_kl":
        return kl(student, teacher)
    middle = _middle(student, teacher, beta)
    return beta * kl(teacher, middle) + (1 - beta) * kl(student, middle)


class Scores(NamedTuple):
    """What both sides take the softmax of, [N, V]."""

    student: Tensor
    teacher: Tensor

    def logs(self) -> "Scores":
        return Scores(torch.log_softmax(self.student, -1), torch.log_softmax(self.teacher, -1))


def distance_gradient(scores: Scores, logs: Scores, distance: str, beta: float) -> Tensor:
    """d distance / d scores of the student, [N, V]: 0 exactly where both sides are equal in kl.

    Probabilities come from scores: from their logarithms they would be twice as far off.
    """
    p = torch.softmax(scores.student, -1)
    if distance == "kl":
        return p - torch.softmax(scores.teacher, -1)
    if distance == "reverse_kl":
        by_probability = logs.student - logs.teacher
    else:
        by_probability = (1 - beta) * (logs.student - _middle(*logs, beta))
    # A constant changes nothing in exact arithmetic. This one spares the likeliest entry, whose
    # probability may be close to 1, a difference of two numbers that are nearly the same.
    by_probability = by_probability - by_probability.gather(1, p.argmax(-1, keepdim=True))
    by_probability = by_probability.masked_fill(p == 0, 0)
    return p * (by_probability - (p * by_probability).sum(-1, keepdim=True))


def gains(terms: Terms, rows: slice) -> list[Tensor]:
    """What the gradients of both values of a token are multiplied by, [R, 1] or [1, 1] each."""
    scaled, weights = terms.coefficients[None], terms.weights(rows)
    return list((scaled if weights is None else scaled * weights[:, None]).split(1, dim=1))


def add_ce(
    grad: Tensor | None, log_student: Tensor, terms: Terms, rows: slice, per_token: Tensor
) -> None:
    """The cross-entropy of a block into `per_token`, and its part of the gradient onto `grad`."""
    labels = terms.labels[rows]
    per_token[rows, 1] = cross_entropy(log_student, labels)
    if grad is not None:
        _, gain = gains(terms, rows)
        grad.addcmul_(gain, log_student.exp())
        grad.scatter_add_(1, _places(grad, labels), -gain.expand(len(labels), 1))


def dense_block(
    student: Tensor, teacher: Tensor, terms: Terms, rows: slice, per_token: Tensor, wants: bool
) -> Tensor | None:
    """One block of logits [R, V]: fills `per_token[rows]`; returns d loss / d student if wanted.

    Logits of rows that do not count must be finite.
    """
    student, slope = cap(student, terms.student_softcap)
    teacher, _ = cap(teacher, terms.teacher_softcap)
    scores = Scores(student / terms.temperature, teacher / terms.temperature)
    logs = scores.logs()
    per_token[rows, 0] = distances(*logs, terms.distance, terms.jsd_beta)
    grad = None
    if wants:
        kl_gain, _ = gains(terms, rows)
        grad = distance_gradient(scores, logs, terms.distance, terms.jsd_beta)
        grad.mul_(kl_gain / terms.temperature)
    if terms.labels is not None:
        log_student = logs.student if terms.temperature == 1 else torch.log_softmax(student, -1)
        add_ce(grad, log_student, terms, rows, per_token)
    return grad if grad is None or slope is None else grad.mul_(slope)


def fill_sums(sums: Tensor, terms: Terms, per_token: Tensor) -> None:
    """Weighted sums of both values over all tokens; clears the values that do not count."""
    weighted = per_token
    if terms.row_weights is not None:
        weights = terms.weights(slice(None))[:, None]
        weighted = weights * per_token.masked_fill_(weights == 0, 0)
    sums.copy_(weighted.sum(0))


def counted(rows: Tensor, weights: Tensor | None) -> Tensor:
    """Rows [R, D], 0 where they do not count: whatever they hold then reaches nothing."""
    return rows if weights is None else torch.where(weights[:, None] == 0, 0, rows)


def blocks(per_token: Tensor, columns: int, budget: int) -> Iterator[slice]:
    """Slices of tokens whose blocks of `columns` numbers a token fit `budget` bytes."""
    tokens = len(per_token)
    block = max(1, budget // (columns * per_token.dtype.itemsize))
    for begin in range(0, tokens, block):
        yield slice(begin, min(tokens, begin + block))


class ProjectionGradients:
    """Gradients of hidden [N, D], head [V, D] and bias [V]: the last two add up over blocks.

    They do so in `work`, in their own buffer if it has that dtype.
    """

    def __init__(
        self, hidden: Tensor | None, head: Tensor | None, bias: Tensor | None, work: torch.dtype
    ) -> None:
        self.hidden = hidden
        self.wanted = [grad for grad in (head, bias) if grad is not None]
        self.is_wanted = bool(self.wanted) or hidden is not None
        self.head, self.bias = (
            None
            if grad is None
            else grad.zero_()
            if grad.dtype == work
            else torch.zeros_like(grad, dtype=work)
            for grad in (head, bias)
        )

    def add(self, grad: Tensor, x: Tensor, head: Tensor, rows: slice) -> None:
        """One block: grad [R, V] of its logits, its hidden states x [R, D]."""
        if self.hidden is not None:
            self.hidden[rows] = grad @ head
        if self.head is not None:
            self.head.addmm_(grad.T, x)
        if self.bias is not None:
            self.bias += grad.sum(0)

    def add_gathered(
        self, grad: Tensor, x: Tensor, heads: Tensor, places: Tensor, rows: slice
    ) -> None:
        """One block: grad [R, k] of its logits at `places`; heads [R, k, D] are these rows."""
        if self.hidden is not None:
            self.hidden[rows] = (grad[:, None] @ heads).squeeze(1)
        if self.head is not None:
            outer = grad[:, :, None] * x[:, None]
            self.head.index_add_(0, places.flatten(), outer.flatten(0, 1))
        if self.bias is not None:
            self.bias.index_add_(0, places.flatten(), grad.flatten())

    def finish(self) -> None:
        sums = [total for total in (self.head, self.bias) if total is not None]
        for grad, total in zip(self.wanted, sums, strict=True):
            if grad is not total:
                grad.copy_(total)
