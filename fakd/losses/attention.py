"""The loss of attention distributions."""

from collections.abc import Sequence

from torch import Tensor, nn

from fakd_kernels import AttentionKL, attention_kl

from ..capture import AttentionInputs
from .alike import row_weights
from .shared import (
    check_choice,
    check_temperature,
    check_weight,
    checked_pair_weights,
    mean_over_pairs,
)

HEADS = ("match", "mean", "auto")
DISTANCES = ("kl", "reverse_kl", "jsd", "mse")


class AttentionKLLoss(nn.Module):
    """Align the student's attention distributions with the teacher's, over all layer pairs.

        loss = weight * sum_l pair_weight_l * mean(KL(A_T || A_S))

    with the mean over query rows and heads: L_att (weight gamma) of arXiv 2412.19449. The maps A
    are never stored: queries and keys, as `fakd.capture_attention` gives them, go into one call.

    Args:
        pairs: number of layer pairs, > 0.
        heads: "match" (equal head counts) | "mean" (maps averaged over heads first, any counts) |
            "auto" ("match" where the counts are equal in all pairs, else "mean") | a list with the
            teacher head of each student head.
        distance: "kl" | "reverse_kl" | "jsd" | "mse".
        temperature: > 0, divides the scores of both sides.
        weight: gamma, >= 0.
        pair_weights: one per pair, >= 0; default 1 / L each.
        engine: None lets fakd_kernels choose; a name forces one.

    Raises:
        ValueError: numbers or choices that cannot be; lists of unequal length.
    """

    # Which names the logs have for it, and whether it must be given values.
    name = "attention"
    needs_values = False

    def __init__(
        self,
        pairs: int,
        *,
        heads: str | Sequence[int] = "match",
        distance: str = "kl",
        temperature: float = 1.0,
        weight: float = 1.0,
        pair_weights: Sequence[float] | None = None,
        engine: str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(pairs, bool) or not isinstance(pairs, int) or pairs < 1:
            raise ValueError(
                f"pairs must be an integer >= 1: got {pairs!r}; pass the number of layer pairs."
            )
        if isinstance(heads, str):
            check_choice("heads", heads, HEADS)
        check_choice("distance", distance, DISTANCES)
        check_temperature(temperature)
        check_weight("weight", weight)
        self.pairs = pairs
        self.heads = heads if isinstance(heads, str) else list(heads)
        self.distance = distance
        self.temperature = float(temperature)
        self.weight = float(weight)
        self.pair_weights = checked_pair_weights(pair_weights, pairs)
        self.engine = engine

    def forward(
        self,
        student: Sequence[AttentionInputs],
        teacher: Sequence[AttentionInputs],
        mask: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> AttentionKL:
        """Compute the loss of all pairs.

        Args:
            student: one entry per pair.
            teacher: likewise; receives no gradient. Each pair must agree in tokens, padding,
                causality and window; scales, softcaps, widths and key heads are its own.
            mask: [B, T], row weights >= 0; default the captured padding, and zero exactly there.
            normalizer: what sums over rows and heads are divided by; default the sum of the
                weights times the heads.

        Returns:
            `.loss` [], weighted and differentiable; `.per_pair` [L] and `.per_head`, unweighted
            and detached.

        Raises:
            ValueError: a number of entries other than this module was built for; sides or a mask
                that do not fit each other. TypeError: entries that are no `AttentionInputs`.
        """
        masks = row_weights(student, teacher, self.pairs, mask)
        return self._compare(student, teacher, masks, self.pair_weights, normalizer)

    def logs(self, result: AttentionKL) -> dict[str, Tensor]:
        """The distance of a result, averaged over the pairs, and the same times its weight.

        Returns:
            [] each, detached: "attention", "weighted_attention".
        """
        mean = mean_over_pairs(result.per_pair, self.pair_weights)
        return {self.name: mean, f"weighted_{self.name}": self.weight * mean}

    def extra_repr(self) -> str:
        parts = [f"{self.pairs} pairs", f"heads={self.heads}", f"distance={self.distance}"]
        parts += [f"temperature={self.temperature:g}", f"weight={self.weight:g}"]
        if self.pair_weights is not None:
            parts.append(f"pair_weights={self.pair_weights}")
        return ", ".join(parts)

    def _compare(
        self,
        student: Sequence[AttentionInputs],
        teacher: Sequence[AttentionInputs],
        masks: list[Tensor | None],
        pair_weights: list[float] | None,
        normalizer: float | Tensor | None,
    ) -> AttentionKL:
        """One call for all pairs."""
        return attention_kl(
            [s.query for s in student],
            [s.key for s in student],
            [t.query for t in teacher],
            [t.key for t in teacher],
            mask=masks,
            causal=[s.is_causal for s in student],
            window=[s.window for s in student],
            student_scale=[s.scale for s in student],
            teacher_scale=[t.scale for t in teacher],
            student_softcap=[s.softcap for s in student],
            teacher_softcap=[t.softcap for t in teacher],
            temperature=self.temperature,
            heads=self._head_rule(student, teacher),
            distance=self.distance,
            weight=self.weight,
            pair_weights=pair_weights,
            normalizer=normalizer,
            engine=self.engine,
        )

    def _head_rule(self, student, teacher) -> str | list[int]:
        if self.heads != "auto":
            return self.heads
        pairs = zip(student, teacher, strict=True)
        is_equal = all(s.query.shape[1] == t.query.shape[1] for s, t in pairs)
        return "match" if is_equal else "mean"
