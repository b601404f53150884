"""Alignment of attention maps that exist already: the public function, and the registered op.

    A = the maps, or their softmax per query row and head;    L as in `attention_kl`

`fakd::attention_map_kl` computes the value and every wanted gradient in one pass over the maps;
backward only scales the gradients.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _attention, _engines, _pairs, _validate
from ..._attention import AttentionKL
from ..._backward import register_autograd, wanted
from . import dispatch
from .arguments import lower


def attention_map_kl(
    student_maps: Tensor | Sequence[Tensor],
    teacher_maps: Tensor | Sequence[Tensor],
    *,
    mask: Tensor | Sequence[Tensor | None] | None = None,
    causal: bool | Sequence[bool] = False,
    window: int | Sequence[int | None] | None = None,
    inputs: str = "probabilities",
    temperature: float = 1.0,
    heads: str | Sequence[int] = "match",
    distance: str = "kl",
    weight: float | Tensor = 1.0,
    pair_weights: Sequence[float] | Tensor | None = None,
    normalizer: float | Tensor | None = None,
    engine: str | None = None,
) -> AttentionKL:
    """Align attention maps, for those who have them (`output_attentions=True`).

    Equivalent to, summed over the layer pairs with `pair_weights`:

        student, teacher = student_maps, teacher_maps         # or softmax(scores / temperature, -1)
        loss = weight * (teacher * (teacher.log() - student.log())).sum(-1).mean()

    in one pass that writes the gradient beside the value. `attention_kl` needs no maps at all.

    Args:
        student_maps: one tensor per pair, `[B, H, T, T]`, float16 | bfloat16 | float32 | float64. A
            single tensor is one pair.
        teacher_maps: `[B, H', T, T]`. Never receives a gradient.
        mask: `[B, T]`, bool or float weights >= 0, of query rows; keys of weight 0 do not count.
        causal: keys j <= i only. One value for all pairs, or a list; `window` likewise.
        window: keys with |i - j| < window only.
        inputs: "probabilities", taken as they are, or "scores", whose softmax over the keys that
            count is taken first. Scores may hold -inf or a large negative number at masked keys.
        temperature: > 0, divides scores; 1 for probabilities.
        heads: "match" | "mean" | a list with the teacher head of each student head.
        distance: "kl" KL(A_T || A_S) | "reverse_kl" | "jsd" (equal parts) | "mse" (sum over keys).
        weight: number, or a 0-dim tensor, which receives its gradient (learned weight).
        pair_weights: L numbers or a tensor `[L]`; default 1 / L each.
        normalizer: what the weighted sums over rows and heads are divided by, > 0; default the sum
            of row weights times the student's heads (times 1 for "mean").
        engine: None, or "reference" | "cpu" | "triton" | "cuda" to force one.
            `FAKD_ENGINE` likewise.

    Returns:
        `AttentionKL`: loss [], per_pair [L] and per_head (the last two detached), float32 (float64
        for float64 inputs). All rows masked: loss 0 and gradients 0.

    Raises:
        ValueError: shapes, ranges, devices or list lengths. TypeError: dtypes or types.
        RuntimeError: a forced engine cannot serve; a second derivative is asked for, or one in
            forward mode.

    Numerics:
        Arithmetic in float32 (float64 for float64 inputs). Probabilities below 2^-126 count as
        2^-126 and receive no gradient, so that a 0 in the student's map gives a large loss instead
        of an infinite one. Gradients in the dtype of their tensor; those of float16 tensors stay in
        float32 until backward. Rows of weight 0 are not read by the C++ engine.

    Source:
        L_att of arXiv 2412.19449; scores with "mse" are close to TinyBERT (arXiv 1909.10351).
    """
    lowered, inverse = lower(
        student_maps,
        teacher_maps,
        mask,
        causal,
        window,
        inputs,
        temperature,
        heads,
        distance,
        weight,
        pair_weights,
        normalizer,
        engine,
    )
    loss, sums, _ = torch.ops.fakd.attention_map_kl(*lowered)
    return AttentionKL.of(loss, sums, _sizes(lowered), inverse)


torch.library.define(
    "fakd::attention_map_kl",
    "(Tensor[] student_maps, Tensor[] teacher_maps, Tensor[] row_weights, Tensor coefficients, "
    "int[] row_weights_of, bool[] wants, bool[] causal, SymInt[] window, bool are_scores, "
    "float temperature, int[] teacher_heads, str distance, str engine) "
    "-> (Tensor, Tensor, Tensor[])",
)


@torch.library.impl("fakd::attention_map_kl", "CompositeExplicitAutograd")
def _attention_map_kl(*lowered):
    _validate.check_masks(lowered[2])
    problem, chosen, grads = dispatch.resolve(*lowered)
    return _attention.fill(problem, dispatch.FILL[chosen], grads)


@torch.library.register_fake("fakd::attention_map_kl")
def _fake(student_maps, teacher_maps, row_weights, coefficients, row_weights_of, wants, *rest):
    teacher_heads = rest[4]
    count = sum(_attention.heads_compared(maps, teacher_heads) for maps in student_maps)
    grads = _pairs.present(_pairs.grad_buffers(student_maps, wants, empty=torch.empty))
    return coefficients.new_empty(()), coefficients.new_empty((count,)), grads


def _leaves(lowered: tuple) -> list[Tensor]:
    return wanted(lowered[0], lowered[5])


def _sizes(lowered: tuple) -> list[int]:
    return [_attention.heads_compared(maps, lowered[-3]) for maps in lowered[0]]


register_autograd("attention_map_kl", 3, _leaves, _sizes)


_engines.register_explainer(attention_map_kl, lower, dispatch.explain)
