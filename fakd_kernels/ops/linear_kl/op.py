"""Output alignment from hidden states and LM heads: the public function, and the op beneath it.

    z = softcap(h W^T + b);   P = softmax(z / temperature) per token
    L = (kl_weight temperature^2 sum_n w_n distance(P_T, P_S)_n + ce_weight sum_n w_n CE_n)
        / normalizer

`fakd::linear_kl` computes the value and every wanted gradient in one pass, a block of tokens at a
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
class LinearKL(_outputs.OutputKL):
    """The result of `linear_kl`; a pytree. Only `loss` carries a gradient."""


pytree.register_dataclass(LinearKL)


def linear_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
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
    block_bytes: int | None = None,
    engine: str | None = None,
) -> LinearKL:
    """Align output distributions with a teacher's straight from hidden states and LM heads.

    Equivalent to

        student = F.linear(student_hidden, student_head, student_bias).float()    # [N, V]
        teacher = F.linear(teacher_hidden, teacher_head, teacher_bias).float()
        kl = F.kl_div(
            (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1),
            reduction="batchmean",
        )
        loss = kl_weight * temperature**2 * kl + ce_weight * F.cross_entropy(student, labels)

    without storing N x V logits or rounding them to the models' dtype, and with the gradients
    computed in the same pass as the value. Logits of fewer than some 500 entries are no burden:
    `logit_kl` of them takes less time.

    Args:
        student_hidden: `[B, T, D]` or `[N, D]`, float16 | bfloat16 | float32 | float64 (reference
            engine only). Copied if the last axis is not contiguous or the leading axes cannot be
            viewed as one.
        student_head: `[V, D]` (`nn.Linear` layout), any of these dtypes. Copied if not contiguous.
        teacher_hidden: `[B, T, D']` or `[N, D']`. Teacher tensors never receive a gradient.
        teacher_head: `[V, D']`; widths and dtypes may differ from the student's.
        student_bias: `[V]`. teacher_bias likewise.
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
            cross-entropy. teacher_softcap likewise.
        vocab: None, where both heads have equal V, or "prefix": only the first
            min(V_S, V_T) entries exist, in both terms and on both sides.
        normalizer: what both weighted sums over tokens are divided by, > 0; default the sum of row
            weights (`.tokens`). Pass the global count for accumulation or data parallelism.
        block_bytes: memory for the float32 logits of both sides of a block of tokens, a block
            being at least one token; default up to the engine, on a GPU 512 MiB or 512 tokens.
        engine: None, or "reference" | "cpu" | "triton" | "cuda" to force one.
            `FAKD_ENGINE` likewise.

    Returns:
        `LinearKL`: loss []; kl [] and ce [], the weighted means without any factor (ce is 0 without
        labels); per_token [N], kl_weight * temperature^2 * distance + ce_weight * ce before the row
        weights, 0 where a token does not count; tokens [], the sum of row weights. All but the
        loss are detached; float32 (float64 for float64 inputs). Nothing counts: loss 0 and
        gradients 0.

    Raises:
        ValueError: shapes, ranges, devices; on a CPU also labels outside the vocabulary and weights
            below 0. On a GPU that check would stall the stream: there the Triton engine makes the
            cross-entropy of such a label NaN. TypeError: dtypes or types.
        RuntimeError: a forced engine cannot serve; a second derivative is asked for, or one in
            forward mode.

    Numerics:
        Logits, softmax and sums in float32 (float64 for float64 inputs), gradients in the dtype of
        their tensor; those of float16 tensors stay in float32 until backward. On a GPU the
        gradient of the logits of bfloat16 models is rounded to bfloat16, as tensor cores take it:
        relative errors of dW and dH of 2.2e-3 instead of 1.7e-3, where those of eager are 1.2e-2
        and 1.1e-2 (computed on a CPU). Partial sums of dW are rounded there for every 2 D tokens:
        2.5e-3 for 4 D, 3.7e-3 at most. A CPU that multiplies bfloat16 (AMX, AMD's AVX512-BF16)
        rounds it for dW alone: 2.4e-3. float16 and mixed models multiply in float32. Under
        autocast, states, heads and biases are cast as `F.linear` casts them. Equal logits on both
        sides give a "kl" gradient of exactly 0. A logit of -inf has probability 0; NaN reaches the
        loss. Deterministic.

    Source:
        L_soft of arXiv 2412.19449; the generalised JSD is that of arXiv 2306.13649.
    """
    lowered, rows = lower(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        student_bias,
        teacher_bias,
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
        block_bytes,
        engine,
    )
    return LinearKL(*_outputs.results(torch.ops.fakd.linear_kl(*lowered), rows))


torch.library.define(
    "fakd::linear_kl",
    "(Tensor student_hidden, Tensor student_head, Tensor? student_bias, Tensor teacher_hidden, "
    "Tensor teacher_head, Tensor? teacher_bias, Tensor? labels, Tensor? row_weights, "
    "Tensor coefficients, bool[] wants, SymInt vocab, float temperature, float student_softcap, "
    "float teacher_softcap, str distance, float jsd_beta, SymInt block_bytes, str engine) "
    "-> (Tensor, Tensor, Tensor, Tensor[])",
)


@torch.library.impl("fakd::linear_kl", "CompositeExplicitAutograd")
def _linear_kl(*lowered):
    labels, row_weights, _, _, vocab = lowered[6:11]
    _output_checks.check_values(labels, row_weights, vocab)
    problem, chosen, grads = dispatch.resolve(*lowered)
    return _outputs.fill(problem, dispatch.FILL[chosen], grads)


@torch.library.register_fake("fakd::linear_kl")
def _fake(*lowered):
    coefficients, wants = lowered[8:10]
    grads = _pairs.grad_buffers(lowered[:3], wants, empty=torch.empty)
    return *_outputs.fake_values(coefficients, lowered[0].shape[0]), _pairs.present(grads)


register_autograd(
    "linear_kl",
    coefficients_at=8,
    leaves_of=lambda arguments: wanted(arguments[:3], arguments[9]),
)


_engines.register_explainer(linear_kl, lower, dispatch.explain)
