"""Alignment of given logits: the public function, and the registered op beneath it.

    z = softcap(logits);   P = softmax(z / temperature) per token
    L = (kl_weight temperature^2 sum_n w_n distance(P_T, P_S)_n + ce_weight sum_n w_n CE_n)
        / normalizer

`fakd::logit_kl` computes the value and the gradient in one pass; backward only scales the gradient.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ... import _engines, _output_checks, _outputs, _pairs
from ..._backward import register_autograd, wanted
from . import dispatch
from .arguments import lower


@dataclass(frozen=True)
class LogitKL(_outputs.OutputKL):
    """The result of `logit_kl`; a pytree. Only `loss` carries a gradient."""


pytree.register_dataclass(LogitKL)


def logit_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    distance: str = "kl",
    jsd_beta: float = 0.5,
    kl_weight: float | Tensor = 1.0,
    ce_weight: float | Tensor = 0.0,
    ignore_index: int = -100,
    scale_by_temperature_squared: bool = True,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    vocab: str | None = None,
    normalizer: float | Tensor | None = None,
    engine: str | None = None,
) -> LogitKL:
    """Align output distributions with a teacher's, from logits that exist anyway.

    Equivalent to

        kl = F.kl_div(
            (student_logits.float() / temperature).log_softmax(-1),
            (teacher_logits.float() / temperature).softmax(-1),
            reduction="batchmean",
        )
        loss = kl_weight * temperature**2 * kl + ce_weight * F.cross_entropy(student_logits, labels)

    without copies of probabilities or their logarithms, and with the gradient written in the same
    pass as the value. From hidden states, `linear_kl` needs no logits at all.

    Args:
        student_logits: `[B, T, V]` or `[N, V]`, float16 | bfloat16 | float32 | float64 (reference
            engine only), of language models or of classifiers. Any row stride; copied if the last
            axis is not contiguous or the leading axes cannot be viewed as one: so shift labels
            (pad them with `ignore_index`), not logits.
        teacher_logits: of the same shape, any of these dtypes. Never receives a gradient.
        labels: `[B, T]` or `[N]` int64, already shifted by the caller. Tokens equal to
            `ignore_index` count in neither term. Without a `ce_weight` they only make `.ce`.
        mask: `[B, T]` or `[N]`, bool or float row weights >= 0. Tokens of weight 0 count nowhere:
            whatever they hold, NaN and labels included, does no harm.
        temperature: > 0, divides the logits of both sides in the distance; the cross-entropy is at
            temperature 1.
        distance: "kl" KL(T || S) | "reverse_kl" KL(S || T) | "jsd" b KL(T || M) + (1-b) KL(S || M),
            M = b T + (1-b) S.
        jsd_beta: b of "jsd", between 0 and 1.
        kl_weight: number, or a 0-dim tensor, which receives its gradient (learned weight).
        ce_weight: likewise; needs labels unless it is 0.
        ignore_index: the label of tokens that do not count.
        scale_by_temperature_squared: multiply the distance by temperature^2, so that its gradient
            keeps its size when the temperature rises.
        student_softcap: > 0, logits become softcap * tanh(logits / softcap), before temperature and
            cross-entropy. None for logits that a model has capped. teacher_softcap likewise.
        vocab: None, where both sides have equal V, or "prefix": only the first
            min(V_S, V_T) entries exist, in both terms and on both sides.
        normalizer: what both weighted sums over tokens are divided by, > 0; default the sum of row
            weights (`.tokens`). Pass the global count for accumulation or data parallelism.
        engine: None, or "reference" | "cpu" | "triton" | "cuda" to force one.
            `FAKD_ENGINE` likewise.

    Returns:
        `LogitKL`: loss []; kl [] and ce [], the weighted means without any factor (ce is 0 without
        labels); per_token [N], kl_weight * temperature^2 * distance + ce_weight * ce before the row
        weights, 0 where a token does not count; tokens [], the sum of row weights. All but the
        loss are detached; float32 (float64 for float64 inputs). Nothing counts: loss 0 and
        gradient 0.

    Raises:
        ValueError: shapes, ranges, devices; on a CPU also labels outside the vocabulary and weights
            below 0. On a GPU that check would stall the stream: there the Triton engine makes the
            cross-entropy of such a label NaN. TypeError: dtypes or types.
        RuntimeError: a forced engine cannot serve; a second derivative is asked for, or one in
            forward mode.

    Numerics:
        Softmax and sums in float32 (float64 for float64 inputs), the gradient in the logits' dtype;
        that of float16 logits stays in float32 until backward. Equal logits on both sides give a
        "kl" gradient of exactly 0. A logit of -inf has probability 0, so that entries masked on
        both sides are as if they were not there; NaN reaches the loss. Deterministic.

    Source:
        L_soft of arXiv 2412.19449; the generalised JSD is that of arXiv 2306.13649.
    """
    lowered, rows = lower(
        student_logits,
        teacher_logits,
        labels,
        mask,
        temperature,
        distance,
        jsd_beta,
        kl_weight,
        ce_weight,
        ignore_index,
        scale_by_temperature_squared,
        student_softcap,
        teacher_softcap,
        vocab,
        normalizer,
        engine,
    )
    return LogitKL(*_outputs.results(torch.ops.fakd.logit_kl(*lowered), rows))


torch.library.define(
    "fakd::logit_kl",
    # One gradient, [0] if not wanted: lists of tensors would cost more than a small classifier.
    "(Tensor student_logits, Tensor teacher_logits, Tensor? labels, Tensor? row_weights, "
    "Tensor coefficients, bool wants_grad, SymInt vocab, float temperature, float student_softcap, "
    "float teacher_softcap, str distance, float jsd_beta, str engine) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("fakd::logit_kl", "CompositeExplicitAutograd")
def _logit_kl(*lowered):
    labels, row_weights, _, _, vocab = lowered[2:7]
    _output_checks.check_values(labels, row_weights, vocab)
    problem, chosen, grad = dispatch.resolve(*lowered)
    return _outputs.fill(problem, dispatch.FILL[chosen], grad)


@torch.library.register_fake("fakd::logit_kl")
def _fake(*lowered):
    coefficients, wants_grad = lowered[4:6]
    (grad,) = _pairs.grad_buffers(lowered[:1], [wants_grad], empty=torch.empty)
    grad = coefficients.new_empty(0) if grad is None else grad
    return *_outputs.fake_values(coefficients, lowered[0].shape[0]), grad


register_autograd(
    "logit_kl",
    coefficients_at=4,
    leaves_of=lambda arguments: wanted(arguments[:1], arguments[5:6]),
)


_engines.register_explainer(logit_kl, lower, dispatch.explain)
