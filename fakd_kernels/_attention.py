"""What the two ops on attention share: which keys count, which heads meet, distances of maps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import _pairs, _validate

DISTANCES = ("kl", "reverse_kl", "jsd", "mse")
CPU_DISTANCES = {"kl": 0, "reverse_kl": 1, "mse": 2, "jsd": 3}  # as csrc/cpu/row_kernels.h counts


@dataclass(frozen=True)
class AttentionKL:
    """The result of `attention_kl` and `attention_map_kl`; a pytree. Only `loss` has a gradient."""

    loss: Tensor  # []
    per_pair: Tensor  # [L], detached: weighted mean of the distance over rows and heads
    per_head: list[Tensor]  # [H] each, detached: likewise per student head ([1] for heads="mean")

    @staticmethod
    def of(loss: Tensor, sums: Tensor, sizes: Sequence[int], inverse: Tensor) -> "AttentionKL":
        """From sums over rows of every head, pair after pair, and 1 / normalizer of every pair."""
        sums, inverse = sums.detach(), inverse.detach()
        # The normalizer counts heads; the mean of one head does not.
        if _pairs.is_even(sizes):
            means = sums.view(len(sizes), -1) * (inverse * sizes[0])[:, None]
            return AttentionKL(loss, means.mean(1), list(means.unbind()))
        apart = sums.split(list(sizes))
        per_head = [s * inverse[index] * len(s) for index, s in enumerate(apart)]
        return AttentionKL(loss, torch.stack([means.mean() for means in per_head]), per_head)


pytree.register_dataclass(AttentionKL)


def heads_compared(tensor: Tensor, teacher_heads: list[int]) -> int:
    """The maps of a pair [B, H, ...] that are compared: its heads, or one if they are averaged."""
    return tensor.shape[1] if teacher_heads else 1


def zero_sums(sizes: Sequence[int], coefficients: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Sums over rows of the heads of all pairs, to add to, and those of every pair, its views."""
    sums = torch.zeros(sum(sizes), dtype=coefficients.dtype, device=coefficients.device)
    return sums, list(sums.split(list(sizes)))


def fill(problem, engine, grads: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Let an engine fill the buffers of a problem: what the registered ops return."""
    engine(problem)
    of_pairs = _pairs.sum_parts(problem.sums, [len(pair.sums) for pair in problem.pairs])
    return _pairs.loss_of(problem.coefficients, of_pairs), problem.sums, grads


def row_scales(
    masks: Sequence[Tensor | None],
    rows: Sequence[tuple[int, int, int]],
    pair_weights,
    normalizer,
    like: Tensor,
    work: torch.dtype,
) -> tuple[list[Tensor], list[int], Tensor, Tensor]:
    """Distinct row weights, each pair's place among them, pair weight / normalizer, 1 / normalizer.

    `rows` holds batch, tokens and compared heads of every pair.
    """
    weights, weights_of = _pairs.unique(masks)
    weights = [_pairs.row_weights_of(w) for w in weights]
    counts = []
    for (batch, tokens, compared), place in zip(rows, weights_of, strict=True):
        if normalizer is not None:
            counts.append(normalizer)
        elif place >= 0:
            counts.append(weights[place].sum(dtype=work) * compared)
        else:
            counts.append(batch * tokens * compared)
    inverse = _pairs.inverse(counts, like, work)
    scale = _pairs.pair_weights_of(pair_weights, len(rows), like.device, work) * inverse
    return weights, weights_of, scale, inverse


def check_mask(index: int, mask: Tensor | None, q: Tensor) -> None:
    if mask is None:
        return
    label = f"mask[{index}]"
    _pairs.check_mask(label, mask)
    _validate.check_device(label, mask, "student_q[0]", q.device)
    if tuple(mask.shape) != (q.shape[0], q.shape[2]):
        raise ValueError(
            f"{label} must have the shape [B, T] = [{q.shape[0]}, {q.shape[2]}]: got "
            f"{list(mask.shape)}; pass the padding mask, not one of T x T."
        )


def apart(name: str, value, count: int) -> list[tuple[str, object]]:
    """The value of every pair, and what to call it: one for all, or a list with one per pair."""
    if not isinstance(value, (list, tuple)):
        return [(name, value)] * count
    _validate.check_count(name, len(value), count)
    return [(f"{name}[{index}]", entry) for index, entry in enumerate(value)]


def check_causal(name: str, causal: bool) -> bool:
    if not isinstance(causal, bool):
        raise TypeError(f"{name} must be a bool: got {type(causal).__name__}; pass True or False.")
    return causal


def check_window(name: str, window: int | None) -> int:
    """-1 stands for none."""
    if window is None:
        return -1
    if isinstance(window, bool) or not isinstance(window, (int, torch.SymInt)):
        raise TypeError(f"{name} must be None or an int: got {type(window).__name__}; pass tokens.")
    if window < 1:
        raise ValueError(f"{name} must be at least 1: got {window}; pass None for no window.")
    return window


def teacher_heads_of(
    heads: str | Sequence[int], student: list[Tensor], teacher: list[Tensor]
) -> list[int]:
    """The teacher head of every student head, pair after pair; empty where heads are averaged."""
    if isinstance(heads, str):
        _validate.check_choice("heads", heads, ("match", "mean"))
        if heads == "mean":
            return []
    elif not isinstance(heads, (list, tuple)):
        raise TypeError(
            "heads must be 'match', 'mean' or a list of ints: got "
            f"{type(heads).__name__}; pass the teacher head of each student head."
        )
    result: list[int] = []
    for index, (q, t) in enumerate(zip(student, teacher, strict=True)):
        chosen = list(range(q.shape[1])) if isinstance(heads, str) else list(heads)
        if isinstance(heads, str) and q.shape[1] != t.shape[1]:
            raise ValueError(
                f"heads='match' must have equal head counts in pair {index}: got {q.shape[1]} "
                f"(student) and {t.shape[1]} (teacher); use 'mean', or a list with the teacher "
                "head of each student head."
            )
        _validate.check_count_of("heads", len(chosen), q.shape[1], f"student head of pair {index}")
        for head in chosen:
            if isinstance(head, bool) or not isinstance(head, int) or not 0 <= head < t.shape[1]:
                raise ValueError(
                    f"heads must be teacher heads from 0 to {t.shape[1] - 1} in pair {index}: got "
                    f"{head!r}; count from 0."
                )
        result += chosen
    return result


def key_range(
    begin: int, end: int, tokens: int, is_causal: bool, window: int | None
) -> tuple[int, int]:
    """The keys that some of the query rows [begin, end) may attend to."""
    first, last = 0, tokens
    if is_causal:
        last = end
    if window is not None:
        first = max(first, begin - window + 1)
        last = min(last, end + window - 1)
    return first, last


def allowed_keys(
    weights: Tensor,
    causal: bool,
    window: int | None,
    rows: tuple[int, int] | None = None,
    keys: tuple[int, int] | None = None,
) -> Tensor:
    """[B, 1, R, J] bool: which keys each query row may attend to; all rows and keys by default.

    A row that does not count attends to itself, so that its softmax exists.
    """
    tokens = weights.shape[1]
    i = torch.arange(*(rows or (0, tokens)), device=weights.device)[:, None]
    j = torch.arange(*(keys or (0, tokens)), device=weights.device)
    allowed = j <= i if causal else (j == j) & (i == i)
    if window is not None:
        allowed = allowed & ((i - j).abs() < window)
    counted = (weights != 0)[:, slice(*keys) if keys else slice(None)]
    return (counted[:, None, :] & allowed | (i == j))[:, None]


def log_mean(log_maps: Tensor, allowed: Tensor) -> Tensor:
    """The logarithm of the mean over heads, [B, 1, T, T]."""
    mean = torch.logsumexp(log_maps, 1, keepdim=True) - math.log(log_maps.shape[1])
    return mean.masked_fill(~allowed, 0)


def distance_of(student: Tensor, teacher: Tensor, allowed: Tensor, distance: str) -> Tensor:
    """[B, H, T], of maps given by their logarithms."""

    def probability(log_map: Tensor) -> Tensor:
        return log_map.exp().masked_fill(~allowed, 0)

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (probability(p) * (p - q)).sum(-1)

    if distance == "mse":
        return (probability(student) - probability(teacher)).square().sum(-1)
    if distance == "kl":
        return kl(teacher, student)
    if distance == "reverse_kl":
        return kl(student, teacher)
    middle = torch.logaddexp(student, teacher) - math.log(2)
    return (kl(teacher, middle) + kl(student, middle)) / 2


def score_gradient(
    student: Tensor, maps: Tensor, teacher: Tensor, allowed: Tensor, distance: str
) -> Tensor:
    """d distance / d scores of every student head, [B, H, R, J].

    `maps` are the student's maps that are compared: `student` itself, or its mean over heads.
    """
    p = student.exp().masked_fill(~allowed, 0)
    t = teacher.exp().masked_fill(~allowed, 0)
    is_mean = maps is not student
    if distance == "kl" and not is_mean:
        return p - t
    if distance == "kl":
        # T times P / S, which is at most H: T / S alone overflows where S is tiny.
        product = t * (student - maps).exp()
        return (p * product.sum(-1, keepdim=True) - product) / student.shape[1]
    if distance == "reverse_kl":
        by_map = maps - teacher
    elif distance == "mse":
        by_map = 2 * (maps.exp() - t)
    else:
        by_map = (maps - (torch.logaddexp(maps, teacher) - math.log(2))) / 2
    by_map = by_map.masked_fill(~allowed, 0)
    if is_mean:
        by_map = by_map / student.shape[1]
    product = p * by_map
    return product - p * product.sum(-1, keepdim=True)
