"""What the ops on outputs (`linear_kl`, `logit_kl`, `topk_kl`) do alike, but for arithmetic.

Two values per token, the distance and the cross-entropy, in this order wherever there is a 2:

    loss = coefficients[0] * sum_n w_n distance_n + coefficients[1] * sum_n w_n ce_n
    coefficients = (kl_weight * temperature^2, ce_weight) / normalizer
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import _engines, _output_checks, _pairs, _validate


@dataclass(frozen=True)
class OutputKL:
    """A pytree. Only `loss` carries a gradient."""

    loss: Tensor  # []
    kl: Tensor  # [], detached: weighted mean of the distance, without kl_weight and temperature^2
    ce: Tensor  # [], detached: weighted mean of the cross-entropy; 0 without labels
    per_token: Tensor  # [N], detached: each token's share of the loss, before its row weight
    tokens: Tensor  # [], detached: the sum of row weights


class Terms(NamedTuple):
    """What is compared, and how it is weighted, once the logits are there."""

    labels: Tensor | None  # [N] int64; anything where the row weight is 0
    row_weights: Tensor | None  # [N] float32, >= 0, contiguous; 0 where labels are ignored
    coefficients: Tensor  # [2] float32 (float64 for float64 inputs)
    temperature: float
    student_softcap: float | None
    teacher_softcap: float | None = None
    distance: str = "kl"  # one of DISTANCES
    jsd_beta: float = 0.5

    def weights(self, rows: slice) -> Tensor | None:
        """Row weights of a block, in the dtype of the arithmetic."""
        if self.row_weights is None:
            return None
        return self.row_weights[rows].to(self.coefficients.dtype)


class Rows(NamedTuple):
    """Labels and mask, lowered: arguments of the registered op, and what its logs are made with."""

    labels: Tensor | None
    row_weights: Tensor | None
    coefficients: Tensor  # [2]: factors * inverse
    factors: Tensor  # [2]: kl_weight * temperature^2, ce_weight
    only_factor: float | None  # of the distance, where it is a number and ce_weight is 0
    inverse: float | Tensor  # []: 1 / normalizer, 0 where nothing counts
    tokens: Tensor  # []


def lower_rows(
    leading: torch.Size,
    like: Tensor,
    work: torch.dtype,
    *,
    labels: Tensor | None,
    mask: Tensor | None,
    ignore_index: int,
    kl_weight: float | Tensor,
    ce_weight: float | Tensor,
    temperature: float,
    scale_by_temperature_squared: bool,
    normalizer: float | Tensor | None,
) -> Rows:
    """Check and lower everything that weighs tokens.

    Args:
        leading: the student's shape without its last axis.
        like: a tensor of the student.
        work: dtype of the arithmetic.
    """
    device = like.device
    _validate.check_number("temperature", temperature, minimum=0.0)
    _validate.check_scalar("kl_weight", kl_weight, device)
    _validate.check_scalar("ce_weight", ce_weight, device)
    _pairs.check_normalizer(normalizer, device)
    _output_checks.check_flag("scale_by_temperature_squared", scale_by_temperature_squared)
    if labels is None and (isinstance(ce_weight, Tensor) or ce_weight != 0):
        raise ValueError(
            "labels must be given where ce_weight is not 0: got None; pass labels, or ce_weight=0."
        )
    weights = None
    if mask is not None:
        _pairs.check_mask("mask", mask)
        _output_checks.check_tokens("mask", mask, leading, device)
        weights = _pairs.row_weights_of(mask.reshape(-1))
    if labels is not None:
        _output_checks.check_labels(labels, leading, device, ignore_index)
        labels = labels.reshape(-1).contiguous()
        is_counted = labels != ignore_index
        weights = is_counted.float() if weights is None else torch.where(is_counted, weights, 0)
    if weights is None:
        tokens = like.new_full((), leading.numel(), dtype=work)
    else:
        tokens = weights.sum(dtype=work)
    kl_factor = kl_weight * (temperature**2 if scale_by_temperature_squared else 1.0)
    factors = _pairs.vector([kl_factor, ce_weight], device, work)
    count = normalizer
    if normalizer is None:
        # Of all tokens, a number: a small classifier feels every operation more.
        count = leading.numel() if weights is None else tokens
    inverse = _pairs.inverse_of(count.to(work) if isinstance(count, Tensor) else count)
    is_alone = not isinstance(kl_weight, Tensor) and labels is None
    only_factor = kl_factor if is_alone else None
    return Rows(labels, weights, factors * inverse, factors, only_factor, inverse, tokens)


def lower_softcap(name: str, softcap: float | None) -> float:
    """Checked; 0 stands for none."""
    if softcap is None:
        return 0.0
    _validate.check_number(name, softcap, minimum=0.0)
    return float(softcap)


def lower_block_bytes(block_bytes: int | None) -> int:
    """Checked; 0 leaves the choice to the engine."""
    if block_bytes is None:
        return 0
    if isinstance(block_bytes, bool) or not isinstance(block_bytes, (int, torch.SymInt)):
        raise TypeError(
            f"block_bytes must be None or an int: got {type(block_bytes).__name__}; pass bytes."
        )
    if block_bytes < 1:
        raise ValueError(f"block_bytes must be at least 1: got {block_bytes}; pass bytes, or None.")
    return block_bytes


def lower_projection(
    hidden: Tensor, head: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Strides that every engine serves."""
    return _pairs.flat(hidden), head.contiguous(), None if bias is None else bias.contiguous()


def wanted(*tensors: Tensor | None) -> list[bool]:
    """For every tensor: whether autograd will ask for its gradient."""
    is_grad = torch.is_grad_enabled()
    return [is_grad and tensor is not None and tensor.requires_grad for tensor in tensors]


def results(outputs: tuple, rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `OutputKL`, from what a registered op returned."""
    loss, sums, per_token = outputs[:3]
    inverse, factors = rows.inverse, rows.factors.detach()
    kl, ce = (sums * (inverse.detach() if isinstance(inverse, Tensor) else inverse)).unbind()
    # A term of weight 0 adds nothing, even where it is not finite.
    if rows.only_factor is None:
        shares = torch.mv(torch.where(factors == 0, 0, per_token), factors)
    elif rows.only_factor == 0:
        shares = torch.zeros_like(per_token[:, 0])
    else:
        shares = per_token[:, 0] * rows.only_factor
    return loss, kl, ce, shares, rows.tokens


def refusals(problem) -> _engines.Refusals:
    """Why each engine cannot serve a call, None where it can."""
    coefficients = problem.terms.coefficients
    place = coefficients.device, coefficients.dtype == torch.float64
    return {
        "reference": None,
        "cpu": _engines.cpu_refusal(*place),
        "triton": _engines.triton_refusal(*place),
    }


def dense_refusals(problem) -> _engines.Refusals:
    """Likewise of calls whose teacher has logits as well: the CUDA kernels compare rows of both."""
    coefficients = problem.terms.coefficients
    is_double = coefficients.dtype == torch.float64
    return refusals(problem) | {"cuda": _engines.cuda_refusal(coefficients.device, is_double)}


def launch_cuda_rows(
    student: Tensor,
    teacher: Tensor,
    grad: Tensor | None,
    terms: Terms,
    rows: slice,
    per_token: Tensor,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
) -> None:
    """The CUDA row kernel on logits [R, V] of the tokens `rows` of a call.

    Args:
        grad: [R, V] float32 or bfloat16, may be the student's own rows; None: values only.
        per_token: [N, 2] of the call, as `terms` are.
        student_bias: [V] float32, to be added before the cap; teacher_bias likewise.
    """
    torch.ops.fakd_ext.score_logits(
        student,
        teacher,
        student_bias,
        teacher_bias,
        None if terms.labels is None else terms.labels[rows],
        terms.weights(rows),
        terms.coefficients.contiguous(),
        grad,
        per_token[rows],
        terms.student_softcap or 0.0,
        terms.teacher_softcap or 0.0,
        terms.temperature,
        terms.jsd_beta,
        _output_checks.DISTANCES.index(terms.distance),
    )


def launch_cuda_sums(problem) -> None:
    """The weighted sums of the values of all tokens, once they are there."""
    torch.ops.fakd_ext.sum_logits(problem.per_token, problem.terms.row_weights, problem.sums)


def fill(problem, engine, grads: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Let an engine fill the buffers of a problem: what the registered ops return."""
    engine(problem)
    loss = _pairs.loss_of(problem.terms.coefficients, problem.sums)
    return loss, problem.sums, problem.per_token, grads


def engine_name(engine: str | None) -> str:
    """What the registered ops take: the engine asked for, "" for a free choice."""
    return _engines.requested(engine) or ""


def compared(grad: Tensor | None, vocab: int, axis: int = 0) -> Tensor | None:
    """What engines fill of a gradient: its first `vocab` entries; the others are 0."""
    if grad is None or grad.shape[axis] == vocab:
        return grad
    grad.narrow(axis, vocab, grad.shape[axis] - vocab).zero_()
    return grad.narrow(axis, 0, vocab)


def places(*tensors: Tensor | None) -> tuple[list[Tensor], list[int]]:
    """The tensors that are there, and the place of each among them (-1 for None)."""
    present = _pairs.present(tensors)
    before = iter(range(len(present)))
    return present, [-1 if tensor is None else next(before) for tensor in tensors]


def fake_values(coefficients: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, sums and the values of every token, as the registered ops return them."""
    return tuple(coefficients.new_empty(shape) for shape in ((), (2,), (tokens, 2)))
