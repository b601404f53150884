"""Attention alignment from queries and keys: the public function, and the registered op beneath it.

    s = softcap(scale * q.k) / temperature, masked;   A = softmax(s) per query row and head
    L = weight * sum_l pair_weight_l / normalizer_l * sum_{b,h,i} w_bi distance(A_T, A_S)_bhi

`fakd::attention_kl` computes the value and every wanted gradient in one pass, a block of query rows
at a time; backward only scales the gradients.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _attention, _engines, _pairs, _validate
from ..._attention import AttentionKL
from ..._backward import register_autograd, wanted
from . import dispatch
from .arguments import lower


def attention_kl(
    student_q: Tensor | Sequence[Tensor],
    student_k: Tensor | Sequence[Tensor],
    teacher_q: Tensor | Sequence[Tensor],
    teacher_k: Tensor | Sequence[Tensor],
    *,
    mask: Tensor | Sequence[Tensor | None] | None = None,
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
    pair_weights: Sequence[float] | Tensor | None = None,
    normalizer: float | Tensor | None = None,
    engine: str | None = None,
) -> AttentionKL:
    """Align attention distributions with a teacher's straight from queries and keys.

    Equivalent to, summed over the layer pairs with `pair_weights`:

        student = torch.softmax(student_q @ student_k.mT * student_scale, -1)    # [B, H, T, T]
        teacher = torch.softmax(teacher_q @ teacher_k.mT * teacher_scale, -1)
        loss = weight * (teacher * (teacher.log() - student.log())).sum(-1).mean()

    without storing a T x T map, so that the models may keep scaled-dot-product or flash attention.

    Args:
        student_q: one tensor per pair, `[B, H, T, K]`, float16 | bfloat16 | float32 | float64, as
            the attention product sees it (after rotary embedding). A single tensor is one pair.
        student_k: `[B, Hkv, T, K]`, Hkv divides H (grouped or multi-query attention).
        teacher_q: `[B, H', T, K']`. Never receives a gradient.
        teacher_k: `[B, Hkv', T, K']`; head counts and widths may differ from the student's.
        mask: `[B, T]`, bool or float weights >= 0, of query rows; keys of weight 0 are masked.
            Padding may be on either side. One for all pairs, or one per pair.
        causal: keys j <= i only. This and the next five are one value for all pairs, or a list
            with one per pair (as where a model alternates windows).
        window: keys with |i - j| < window only (`sliding_window` of transformers).
        student_scale: factor of q.k; default K^-0.5. teacher_scale likewise.
        student_softcap: > 0, scores become softcap * tanh(scores / softcap). teacher_softcap
            likewise.
        temperature: > 0, divides the scores of both sides; the loss has no temperature^2.
        heads: "match" (equal head counts) | "mean" (maps averaged over heads first, any counts) | a
            list with the teacher head of each student head.
        distance: "kl" KL(A_T || A_S) | "reverse_kl" | "jsd" (equal parts) | "mse" (sum over keys).
        weight: number, or a 0-dim tensor, which receives its gradient (learned weight).
        pair_weights: L numbers or a tensor `[L]`; default 1 / L each.
        normalizer: what the weighted sums over rows and heads are divided by, > 0; default the sum
            of row weights times the student's heads (times 1 for "mean").
        engine: None, or "reference" | "cpu" | "triton" to force one. `FAKD_ENGINE` likewise.

    Returns:
        `AttentionKL`: loss [], per_pair [L] and per_head (the last two detached), float32 (float64
        for float64 inputs). All rows masked: loss 0 and gradients 0.

    Raises:
        ValueError: shapes, ranges, devices or list lengths. TypeError: dtypes or types.
        RuntimeError: a forced engine cannot serve; a second derivative is asked for, or one in
            forward mode.

    Numerics:
        Scores, softmax and sums in float32 (float64 for float64 inputs), gradients in the dtype of
        their tensor; those of float16 tensors stay in float32 until backward. A CPU that multiplies
        bfloat16 (AMX, AMD's AVX512-BF16) rounds the gradient of the scores of bfloat16 models to
        it for dK alone: relative errors of dK of 1.8e-3 to 2.1e-3 instead of 1.7e-3, where those of
        eager are 8e-3 to 1e-2. Equal scores on both sides give a gradient of exactly 0.
        Deterministic. Tokens of weight 0 are not read by the C++ engine; on the reference engine
        they must be finite.

    Source:
        L_att of arXiv 2412.19449, in our reading of it. The identity d KL / d s = A_S - A_T is the
        usual one of soft targets.
    """
    lowered, inverse = lower(
        student_q,
        student_k,
        teacher_q,
        teacher_k,
        mask,
        causal,
        window,
        student_scale,
        teacher_scale,
        student_softcap,
        teacher_softcap,
        temperature,
        heads,
        distance,
        weight,
        pair_weights,
        normalizer,
        engine,
    )
    loss, sums, _ = torch.ops.fakd.attention_kl(*lowered)
    return AttentionKL.of(loss, sums, _sizes(lowered), inverse)


torch.library.define(
    "fakd::attention_kl",
    "(Tensor[] student_q, Tensor[] student_k, Tensor[] teacher_q, Tensor[] teacher_k, "
    "Tensor[] row_weights, Tensor coefficients, int[] row_weights_of, bool[] wants_q, "
    "bool[] wants_k, float[] student_scale, float[] teacher_scale, float[] student_softcap, "
    "float[] teacher_softcap, bool[] causal, SymInt[] window, float temperature, "
    "int[] teacher_heads, str distance, str engine) -> (Tensor, Tensor, Tensor[])",
)


@torch.library.impl("fakd::attention_kl", "CompositeExplicitAutograd")
def _attention_kl(*lowered):
    _validate.check_masks(lowered[4])
    problem, chosen, grads = dispatch.resolve(*lowered)
    return _attention.fill(problem, dispatch.FILL[chosen], grads)


@torch.library.register_fake("fakd::attention_kl")
def _fake(student_q, student_k, teacher_q, teacher_k, row_weights, coefficients, *rest):
    _, wants_q, wants_k, *_, teacher_heads, _, _ = rest
    count = sum(_attention.heads_compared(q, teacher_heads) for q in student_q)
    grads = _pairs.present(
        _pairs.grad_buffers(student_q, wants_q, empty=torch.empty),
        _pairs.grad_buffers(student_k, wants_k, empty=torch.empty),
    )
    return coefficients.new_empty(()), coefficients.new_empty((count,)), grads


def _leaves(lowered: tuple) -> list[Tensor]:
    student_q, student_k = lowered[:2]
    wants_q, wants_k = lowered[7:9]
    return wanted(student_q, wants_q) + wanted(student_k, wants_k)


def _sizes(lowered: tuple) -> list[int]:
    return [_attention.heads_compared(q, lowered[-3]) for q in lowered[0]]


register_autograd("attention_kl", 5, _leaves, _sizes)


_engines.register_explainer(attention_kl, lower, dispatch.explain)
