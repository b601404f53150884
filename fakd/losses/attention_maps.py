"""The loss of attention maps that exist already."""

from collections.abc import Sequence

from torch import Tensor

from fakd_kernels import AttentionKL, attention_map_kl

from .attention import AttentionKLLoss
from .shared import check_choice, check_lengths

HEADS = ("match", "mean")
INPUTS = ("probabilities", "scores")


class AttentionMapKLLoss(AttentionKLLoss):
    """Align attention maps, as `output_attentions=True` returns them, over all layer pairs.

        loss = weight * sum_l pair_weight_l * mean(KL(A_T || A_S))

    `AttentionKLLoss` computes the same from queries and keys, without maps.

    Args:
        pairs: number of layer pairs, > 0.
        inputs: "probabilities" | "scores", whose softmax is taken first.
        heads: "match" | "mean" | a list with the teacher head of each student head.
        distance: "kl" | "reverse_kl" | "jsd" | "mse".
        causal: keys after the query do not count; with probabilities this saves half the work.
        temperature: > 0, divides scores; 1 for probabilities.
        weight: gamma, >= 0.
        pair_weights: one per pair, >= 0; default 1 / L each.
        engine: None lets fakd_kernels choose; a name forces one.

    Raises:
        ValueError: numbers or choices that cannot be; lists of unequal length.
    """

    name = "attention_map"

    def __init__(
        self,
        pairs: int,
        *,
        inputs: str = "probabilities",
        heads: str | Sequence[int] = "match",
        causal: bool = False,
        **options,
    ) -> None:
        check_choice("inputs", inputs, INPUTS)
        if isinstance(heads, str):
            check_choice("heads", heads, HEADS)
        super().__init__(pairs, heads=heads, **options)
        self.inputs = inputs
        self.causal = causal

    def forward(
        self,
        student_maps: Sequence[Tensor],
        teacher_maps: Sequence[Tensor],
        mask: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> AttentionKL:
        """Compute the loss of all pairs.

        Args:
            student_maps: one tensor per pair, [B, H, T, T].
            teacher_maps: likewise; receives no gradient.
            mask: [B, T], bool or row weights >= 0; None counts every token.
            normalizer: what sums over rows and heads are divided by; default the sum of the
                weights times the heads.

        Returns:
            `.loss` [], weighted and differentiable; `.per_pair` [L] and `.per_head`, detached.
        """
        check_lengths("student_maps", len(student_maps), self.pairs)
        return attention_map_kl(
            list(student_maps),
            list(teacher_maps),
            mask=mask,
            causal=self.causal,
            inputs=self.inputs,
            temperature=self.temperature,
            heads=self.heads,
            distance=self.distance,
            weight=self.weight,
            pair_weights=self.pair_weights,
            normalizer=normalizer,
            engine=self.engine,
        )
