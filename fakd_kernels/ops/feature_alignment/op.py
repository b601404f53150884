"""Feature alignment: the public function, and the registered op beneath it.

    p = h_S W^T + b
    L = sum_l pair_weight_l / normalizer_l * sum_i w_i (cosine_weight (1 - cos(p_i, t_i))
                                                        + euclidean_weight distance(p_i, t_i))

`fakd::feature_alignment` computes the value and every wanted gradient in one pass; backward only
scales the gradients by the incoming scalar. Engines fill buffers that are allocated here, so one
fake implementation is true of all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ... import _engines, _pairs, _validate
from ..._backward import register_autograd, wanted
from . import dispatch
from .arguments import lower


@dataclass(frozen=True)
class FeatureAlignment:
    """The result of `feature_alignment`; a pytree. Only `loss` carries a gradient."""

    loss: Tensor  # []
    cosine: Tensor  # [L], detached: weighted mean of 1 - cos
    euclidean: Tensor  # [L], detached: weighted mean of the Euclidean term


pytree.register_dataclass(FeatureAlignment)


def feature_alignment(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    projection: Tensor | Sequence[Tensor | None] | None = None,
    bias: Tensor | Sequence[Tensor | None] | None = None,
    *,
    mask: Tensor | Sequence[Tensor | None] | None = None,
    cosine_weight: float | Tensor = 1.0,
    euclidean_weight: float | Tensor = 1.0,
    euclidean: str = "squared",
    pair_weights: Sequence[float] | Tensor | None = None,
    normalizer: float | Tensor | None = None,
    eps: float = 1e-8,
    route: str = "auto",
    engine: str | None = None,
) -> FeatureAlignment:
    """Align hidden states with a teacher's, over many layer pairs in one call.

    Equivalent to, summed over the layer pairs with `pair_weights`:

        p = F.linear(student, projection, bias)
        cosine = (1 - F.cosine_similarity(p, teacher, dim=-1)).mean()
        euclidean = (p - teacher).square().mean()    # or (p - teacher).norm(dim=-1).mean()
        loss = cosine_weight * cosine + euclidean_weight * euclidean

    without storing p, and with the gradients computed in the same pass as the value.

    Args:
        student: one tensor per pair, `[B, T, Ds]` or `[N, Ds]`, float16 | bfloat16 | float32 |
            float64 (reference engine only). A single tensor is one pair. Copied if the last axis
            is not contiguous or the leading axes cannot be viewed as one.
        teacher: one tensor per pair, `[B, T, Dt]` or `[N, Dt]`; any of these dtypes, pair by pair.
            Never receives a gradient, even where it requires one.
        projection: one tensor per pair, `[Dt, Ds]` (`nn.Linear` layout), or None where Ds = Dt.
            The same tensor may serve several pairs; its gradient is the sum.
        bias: one tensor per pair, `[Dt]`, or None. Needs a projection.
        mask: `[B, T]` or `[N]`, bool or float row weights >= 0 (negative weights are refused on
            a CPU; on a GPU the check would stall the stream). One for all pairs, or one per pair.
            Rows of weight 0 count nowhere and are not read: a NaN there does no harm.
        cosine_weight: number, or a 0-dim tensor, which receives its gradient (learned weight).
        euclidean_weight: likewise.
        euclidean: "squared": |p - t|^2 / Dt; "distance": |p - t| (gradient 0 where p = t).
        pair_weights: L numbers or a tensor `[L]`; default 1 / L each.
        normalizer: what the weighted row sums are divided by, > 0; default the sum of the row
            weights of the pair. Pass the global count for accumulation or data parallelism.
        eps: > 0. Norms are clamped at it, as in `F.cosine_similarity`.
        route: "auto" | "direct" | "gram", the order of the matrix products (see `count_flops`).
        engine: None, or "reference" | "cpu" | "triton" | "cuda" to force one.
            `FAKD_ENGINE` likewise.

    Returns:
        `FeatureAlignment`: loss [], cosine [L] and euclidean [L] (the last two detached), float32
        (float64 for float64 inputs).
        All rows masked, or no rows at all: loss 0 and gradients 0.

    Raises:
        ValueError: shapes, ranges, devices or list lengths. TypeError: dtypes or types.
        RuntimeError: a forced engine cannot serve; a second derivative is asked for, or one in
            forward mode.

    Numerics:
        Products and sums accumulate in float32 (float64 for float64 inputs). Gradients have the
        dtype of their tensor; those of float16 tensors stay in float32 until backward, so they do
        not underflow before a loss scaler's factor reaches them. Under autocast, students with a
        projection, projections and biases are cast as `F.linear` casts them. Left to itself, the
        gram route serves only where it is as accurate as the direct one: on a CPU where student and
        teacher do not correlate, on a GPU in half precision. Deterministic on every engine. NaN
        and inf in counted rows reach the loss. Zero rows: cosine 0, finite gradients.

    Source:
        L_feat and L_dist of arXiv 2412.19449. The gradient form dL/dp = A p + B t is derived in
        `reference.row_terms`.
    """
    lowered, inverse = lower(
        student,
        teacher,
        projection,
        bias,
        mask,
        cosine_weight,
        euclidean_weight,
        euclidean,
        pair_weights,
        normalizer,
        eps,
        route,
        engine,
    )
    loss, sums, _ = torch.ops.fakd.feature_alignment(*lowered)
    means = sums.detach() * inverse.detach()[:, None]
    return FeatureAlignment(loss, means[:, 0], means[:, 1])


torch.library.define(
    "fakd::feature_alignment",
    "(Tensor[] student, Tensor[] teacher, Tensor[] projections, Tensor[] biases, "
    "Tensor[] row_weights, Tensor coefficients, int[] projection_of, int[] bias_of, "
    "int[] row_weights_of, bool[] wants_student, bool[] wants_projection, bool[] wants_bias, "
    "float eps, str euclidean, str route, str engine) -> (Tensor, Tensor, Tensor[])",
)


@torch.library.impl("fakd::feature_alignment", "CompositeExplicitAutograd")
def _feature_alignment(*lowered):
    _validate.check_masks(lowered[4])
    problem, chosen, grads = dispatch.resolve(*lowered)
    dispatch.FILL[chosen](problem)
    return _pairs.loss_of(problem.coefficients, problem.sums), problem.sums, grads


@torch.library.register_fake("fakd::feature_alignment")
def _fake(
    student,
    teacher,
    projections,
    biases,
    row_weights,
    coefficients,
    projection_of,
    bias_of,
    row_weights_of,
    wants_student,
    wants_projection,
    wants_bias,
    eps,
    euclidean,
    route,
    engine,
):
    grads = _pairs.present(
        _pairs.grad_buffers(student, wants_student, empty=torch.empty),
        _pairs.grad_buffers(projections, wants_projection, empty=torch.empty),
        _pairs.grad_buffers(biases, wants_bias, empty=torch.empty),
    )
    return coefficients.new_empty(()), torch.empty_like(coefficients), grads


def _leaves(lowered: tuple) -> list[Tensor]:
    student, _, projections, biases = lowered[:4]
    wants = lowered[9:12]
    return [
        tensor
        for group, flags in zip((student, projections, biases), wants, strict=True)
        for tensor in wanted(group, flags)
    ]


register_autograd("feature_alignment", 5, _leaves)


_engines.register_explainer(feature_alignment, lower, dispatch.explain)
