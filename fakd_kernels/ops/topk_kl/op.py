"""Alignment with an offline teacher: the public function, and the registered op beneath it.

    z = softcap(h W^T + b);   P_S, P_T over the k stored tokens (and a ghost for all others)
    L = (kl_weight temperature^2 sum_n w_n KL(P_T, P_S)_n + ce_weight sum_n w_n CE_n) / normalizer

`fakd::topk_kl` computes the value and every wanted gradient in one pass, a block of tokens at a
time; backward only scales the gradients.
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
class TopKKL(_outputs.OutputKL):
    """The result of `topk_kl`; a pytree. Only `loss` carries a gradient."""


pytree.register_dataclass(TopKKL)


def topk_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_indices: Tensor,
    teacher_logprobs: Tensor,
    *,
    student_bias: Tensor | None = None,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    kl_weight: float | Tensor = 1.0,
    ce_weight: float | Tensor = 0.0,
    ignore_index: int = -100,
    scale_by_temperature_squared: bool = True,
    student_softcap: float | None = None,
    ghost: bool = False,
    normalizer: float | Tensor | None = None,
    block_bytes: int | None = None,
    engine: str | None = None,
) -> TopKKL:
    """Align output distributions with a teacher's k likeliest tokens, computed beforehand.

    Equivalent to

        student = F.linear(student_hidden, student_head, student_bias).float()    # [N, V]
        # ghost=False: only the k tokens exist, on both sides
        log_s = (student.gather(1, teacher_indices) / temperature).log_softmax(-1)
        log_t = (teacher_logprobs / temperature).log_softmax(-1)
        # ghost=True: one more outcome, "any other token", of what the k probabilities leave of 1
        log_s = student.log_softmax(-1).gather(1, teacher_indices)
        log_s, log_t = (
            torch.cat([p, (1 - p.exp().sum(-1, keepdim=True)).log()], -1)
            for p in (log_s, teacher_logprobs)
        )
        kl = (log_t.exp() * (log_t - log_s)).sum(-1).mean()
        loss = kl_weight * temperature**2 * kl + ce_weight * F.cross_entropy(student, labels)

    without storing N x V logits, and with the gradients computed in the same pass as the value.
    With a ghost every logit receives a gradient, without one the k logits only.

    Args:
        student_hidden: `[B, T, D]` or `[N, D]`, float16 | bfloat16 | float32 | float64 (reference
            engine only). Copied if the last axis is not contiguous or the leading axes cannot be
            viewed as one.
        student_head: `[V, D]` (`nn.Linear` layout), any of these dtypes. Copied if not contiguous.
        teacher_indices: `[B, T, k]` or `[N, k]` int64 or int32, distinct within a token, in any
            order; -1 for an unused entry. A token without entries has the distance 0.
        teacher_logprobs: of the same shape, any float dtype: log-softmax over the teacher's whole
            vocabulary, at the indices. Without a ghost they may be those of any temperature, and
            are divided by `temperature` once more. Unused entries may hold anything.
        student_bias: `[V]`.
        labels: `[B, T]` or `[N]` int64, already shifted by the caller. Tokens equal to
            `ignore_index` count in neither term. The cross-entropy is over the whole vocabulary.
            Without a `ce_weight` they only make `.ce`.
        mask: `[B, T]` or `[N]`, bool or float row weights >= 0. Tokens of weight 0 count nowhere:
            whatever they hold, NaN, indices and labels included, does no harm.
        temperature: > 0, divides the student's logits and the teacher's log-probabilities; 1 with a
            ghost, as the rest is known at temperature 1 only. The cross-entropy is at 1.
        kl_weight: number, or a 0-dim tensor, which receives its gradient (learned weight).
        ce_weight: likewise; needs labels unless it is 0.
        ignore_index: the label of tokens that do not count.
        scale_by_temperature_squared: multiply the distance by temperature^2, so that its gradient
            keeps its size when the temperature rises.
        student_softcap: > 0, logits become softcap * tanh(logits / softcap), before temperature and
            cross-entropy.
        ghost: whether all tokens that are not stored are one more outcome. Where none are left, or
            the stored probabilities sum to 1 or (by rounding) more, the teacher's ghost has
            probability 0.
        normalizer: what both weighted sums over tokens are divided by, > 0; default the sum of row
            weights (`.tokens`). Pass the global count for accumulation or data parallelism.
        block_bytes: memory for the logits (or gathered rows of the head) of a block of tokens, in
            float32, a block being at least one token; default up to the engine, on a GPU 512 MiB
            or 512 tokens.
        engine: None, or "reference" | "cpu" | "triton" to force one. `FAKD_ENGINE` likewise.

    Returns:
        `TopKKL`: loss []; kl [] and ce [], the weighted means without any factor (ce is 0 without
        labels); per_token [N], kl_weight * temperature^2 * KL + ce_weight * ce before the row
        weights, 0 where a token does not count; tokens [], the sum of row weights. All but the
        loss are detached; float32 (float64 for float64 inputs). Nothing counts: loss 0 and
        gradients 0.

    Raises:
        ValueError: shapes, ranges, devices; on a CPU also labels or indices outside the vocabulary,
            indices twice in a token, log-probabilities that sum above 1 and weights below 0. On a
            GPU that check would stall the stream: there the Triton engine makes NaN of a token
            whose label or index is outside. TypeError: dtypes or types.
        RuntimeError: a forced engine cannot serve; a second derivative is asked for, or one in
            forward mode.

    Numerics:
        Logits, softmax and sums in float32 (float64 for float64 inputs), gradients in the dtype of
        their tensor; those of float16 tensors stay in float32 until backward. Stored probabilities
        are normalised over what is compared, so rounded ones do no harm. The gradient of logits is
        rounded where all tensors of the student are in bfloat16, as in `linear_kl`. Under autocast,
        states, head and bias are cast as `F.linear` casts them. Deterministic, but for the
        reference engine on a GPU.

    Source:
        L_soft of arXiv 2412.19449. That k tokens alone teach a biased distribution, and how much it
        costs, is measured in arXiv 2503.16870: hence the ghost.
    """
    lowered, rows = lower(
        student_hidden,
        student_head,
        teacher_indices,
        teacher_logprobs,
        student_bias,
        labels,
        mask,
        temperature,
        kl_weight,
        ce_weight,
        ignore_index,
        scale_by_temperature_squared,
        student_softcap,
        ghost,
        normalizer,
        block_bytes,
        engine,
    )
    return TopKKL(*_outputs.results(torch.ops.fakd.topk_kl(*lowered), rows))


torch.library.define(
    "fakd::topk_kl",
    "(Tensor student_hidden, Tensor student_head, Tensor? student_bias, Tensor teacher_indices, "
    "Tensor teacher_logprobs, Tensor? labels, Tensor? row_weights, Tensor coefficients, "
    "bool[] wants, float temperature, float student_softcap, bool ghost, SymInt block_bytes, "
    "str engine) -> (Tensor, Tensor, Tensor, Tensor[])",
)


@torch.library.impl("fakd::topk_kl", "CompositeExplicitAutograd")
def _topk_kl(*lowered):
    _, head, _, indices, logprobs, labels, row_weights = lowered[:7]
    _output_checks.check_values(labels, row_weights, head.shape[0])
    _output_checks.check_support(indices, logprobs, row_weights, head.shape[0])
    problem, chosen, grads = dispatch.resolve(*lowered)
    return _outputs.fill(problem, dispatch.FILL[chosen], grads)


@torch.library.register_fake("fakd::topk_kl")
def _fake(*lowered):
    coefficients, wants = lowered[7:9]
    grads = _pairs.grad_buffers(lowered[:3], wants, empty=torch.empty)
    return *_outputs.fake_values(coefficients, lowered[0].shape[0]), _pairs.present(grads)


register_autograd(
    "topk_kl",
    coefficients_at=7,
    leaves_of=lambda arguments: wanted(arguments[:3], arguments[8]),
)


_engines.register_explainer(topk_kl, lower, dispatch.explain)
