"""The losses of output distributions: from LM heads, from logits, from a stored teacher."""

from torch import Tensor, nn

from fakd_kernels import LinearKL, LogitKL, TopKKL, linear_kl, logit_kl, topk_kl

from .shared import check_choice, check_temperature, check_weight

DISTANCES = ("kl", "reverse_kl", "jsd")


class _OutputLoss(nn.Module):
    """Settings that all three have, and their logs."""

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        distance: str = "kl",
        jsd_beta: float = 0.5,
        kl_weight: float = 1.0,
        ce_weight: float = 0.0,
        scale_by_temperature_squared: bool = True,
        ignore_index: int = -100,
        engine: str | None = None,
    ) -> None:
        super().__init__()
        check_choice("distance", distance, DISTANCES)
        check_weight("kl_weight", kl_weight)
        check_weight("ce_weight", ce_weight)
        if kl_weight == 0 and ce_weight == 0:
            raise ValueError(
                "kl_weight and ce_weight must not both be 0: got a loss that is 0; raise one."
            )
        check_temperature(temperature)
        if not 0 < jsd_beta < 1:
            raise ValueError(f"jsd_beta must be between 0 and 1: got {jsd_beta}; pass 0.5.")
        self.temperature = float(temperature)
        self.distance = distance
        self.jsd_beta = float(jsd_beta)
        self.kl_weight = float(kl_weight)
        self.ce_weight = float(ce_weight)
        self.scale_by_temperature_squared = scale_by_temperature_squared
        self.ignore_index = ignore_index
        self.engine = engine

    def logs(self, result: LinearKL | LogitKL | TopKKL) -> dict[str, Tensor]:
        """The terms of a result, and the same times their weights.

        Returns:
            [] each, detached: "soft" and "weighted_soft" (temperature^2 included in the latter);
            with cross-entropy also "task" and "weighted_task".
        """
        factor = self.temperature**2 if self.scale_by_temperature_squared else 1.0
        logs = {"soft": result.kl, "weighted_soft": self.kl_weight * factor * result.kl}
        if self.ce_weight > 0:
            logs |= {"task": result.ce, "weighted_task": self.ce_weight * result.ce}
        return logs

    def extra_repr(self) -> str:
        parts = [f"distance={self.distance}", f"temperature={self.temperature:g}"]
        parts += [f"kl_weight={self.kl_weight:g}", f"ce_weight={self.ce_weight:g}"]
        return ", ".join(parts)

    def _options(self, labels: Tensor | None) -> dict:
        return {
            "labels": labels,
            "temperature": self.temperature,
            "kl_weight": self.kl_weight,
            "ce_weight": self.ce_weight if labels is not None else 0.0,
            "ignore_index": self.ignore_index,
            "scale_by_temperature_squared": self.scale_by_temperature_squared,
            "engine": self.engine,
        }

    def _distance(self) -> dict:
        return {"distance": self.distance, "jsd_beta": self.jsd_beta}


class LinearKLLoss(_OutputLoss):
    """Align a language model's outputs with a teacher's, without logits: L_soft (weight alpha).

        loss = kl_weight * temperature^2 * mean(KL(P_T || P_S)) + ce_weight * mean(CE)

    from hidden states and heads, by `fakd_kernels.linear_kl`; means over tokens that count.

    Args:
        temperature: > 0, of both sides in KL; cross-entropy is at 1.
        distance: "kl" | "reverse_kl" | "jsd".
        jsd_beta: in (0, 1); the mixture of "jsd" is beta P_T + (1 - beta) P_S.
        kl_weight: alpha, >= 0.
        ce_weight: weight of the cross-entropy with labels, >= 0; in the same pass.
        scale_by_temperature_squared: keeps gradients of one size when the temperature changes.
        ignore_index: tokens with this label count in neither term.
        vocab: None wants equal vocabularies; "prefix" compares the shared beginning.
        block_bytes: memory for the logits of a block of tokens; None chooses.
        engine: None lets fakd_kernels choose; a name forces one.

    Raises:
        ValueError: numbers or choices that cannot be.
    """

    def __init__(self, *, vocab: str | None = None, block_bytes: int | None = None, **options):
        super().__init__(**options)
        self.vocab = vocab
        self.block_bytes = block_bytes

    def forward(
        self,
        student_hidden: Tensor,
        student_head: Tensor,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        **head_options,
    ) -> LinearKL:
        """Compute the loss; see `fakd_kernels.linear_kl` for shapes and for `head_options`.

        Labels and mask belong to the rows of the hidden states: for next tokens the caller shifts
        (hidden[:, :-1], labels[:, 1:]), as `Distiller` does.
        """
        return linear_kl(
            student_hidden,
            student_head,
            teacher_hidden,
            teacher_head,
            mask=mask,
            normalizer=normalizer,
            vocab=self.vocab,
            block_bytes=self.block_bytes,
            **self._options(labels),
            **self._distance(),
            **head_options,
        )


class LogitKLLoss(_OutputLoss):
    """Align given logits, as of classifiers: L_soft (weight alpha), by `fakd_kernels.logit_kl`.

    Args:
        **options: those of `LinearKLLoss` without `vocab` and `block_bytes`.
    """

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> LogitKL:
        """Compute the loss of logits [N, C] or [B, T, V], of two classes at least."""
        if student_logits.shape[-1] == 1:
            raise ValueError(
                "student_logits must be of at least 2 classes: got 1, as of a regression, whose "
                "softmax is 1 whatever it predicts; align its features instead."
            )
        return logit_kl(
            student_logits,
            teacher_logits,
            mask=mask,
            normalizer=normalizer,
            **self._options(labels),
            **self._distance(),
        )


class TopKKLLoss(_OutputLoss):
    """Align with the k entries per token that an offline teacher stored, by `topk_kl`.

    Args:
        ghost: count all entries that are not stored as one more outcome.
        vocab: "prefix" takes those of a teacher in a `Distiller` from the beginning of its
            vocabulary that the student shares; None wants equal vocabularies there.
        block_bytes: memory for the logits of a block of tokens; None chooses.
        **options: those of `LinearKLLoss`, with distance "kl" only.
    """

    def __init__(
        self,
        *,
        ghost: bool = False,
        vocab: str | None = None,
        block_bytes: int | None = None,
        **options,
    ):
        if options.get("distance", "kl") != "kl":
            raise ValueError(
                f"distance must be 'kl' for a stored teacher: got {options['distance']!r}; drop it."
            )
        super().__init__(**options)
        self.ghost = ghost
        self.vocab = vocab
        self.block_bytes = block_bytes

    def forward(
        self,
        student_hidden: Tensor,
        student_head: Tensor,
        teacher_indices: Tensor,
        teacher_logprobs: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        **head_options,
    ) -> TopKKL:
        """Compute the loss; see `fakd_kernels.topk_kl` for shapes and for `head_options`."""
        return topk_kl(
            student_hidden,
            student_head,
            teacher_indices,
            teacher_logprobs,
            mask=mask,
            normalizer=normalizer,
            ghost=self.ghost,
            block_bytes=self.block_bytes,
            **self._options(labels),
            **head_options,
        )
