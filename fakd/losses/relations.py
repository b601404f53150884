"""The loss of relations between tokens."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fakd_kernels import AttentionKL

from ..capture import AttentionInputs
from .alike import row_weights
from .attention import AttentionKLLoss
from .shared import check_choice, mean_over_pairs

# Relation -> the field of `AttentionInputs` that it compares with itself.
RELATIONS = {"q": "query", "k": "key", "v": "value"}


class RelationKLLoss(AttentionKLLoss):
    """Align how tokens relate to each other in queries, keys and values (MiniLMv2).

        R = softmax(x x^T / sqrt(width)),  x [T, width] one relation head of Q, K or V
        loss = weight * sum_l pair_weight_l * mean over relations of mean(KL(R_T || R_S))

    Heads are joined and split again in `relation_heads`, so that models of any head counts and
    widths compare (arXiv 2012.15828). Relations reach over the keys that attention reaches over:
    padding, causality and windows are those of the layer.

    Args:
        pairs: number of layer pairs, > 0.
        relation_heads: > 0, divides heads times width of everything compared, on both sides.
        relations: some of "q", "k", "v". Values must be captured with `values=True`.
        distance, temperature, weight, pair_weights, engine: as in `AttentionKLLoss`.
    """

    name = "relation"

    def __init__(
        self,
        pairs: int,
        relation_heads: int,
        *,
        relations: Sequence[str] = ("q", "k", "v"),
        distance: str = "kl",
        temperature: float = 1.0,
        weight: float = 1.0,
        pair_weights: Sequence[float] | None = None,
        engine: str | None = None,
    ) -> None:
        super().__init__(
            pairs,
            distance=distance,
            temperature=temperature,
            weight=weight,
            pair_weights=pair_weights,
            engine=engine,
        )
        is_integer = isinstance(relation_heads, int) and not isinstance(relation_heads, bool)
        if not is_integer or relation_heads < 1:
            raise ValueError(
                f"relation_heads must be an integer >= 1: got {relation_heads!r}; pass the "
                "teacher's number of heads."
            )
        relations = tuple(relations)
        if not relations or len(set(relations)) < len(relations):
            raise ValueError(
                f"relations must name each of its relations once: got {list(relations)}; pass "
                "('q', 'k', 'v')."
            )
        for relation in relations:
            check_choice("relations", relation, tuple(RELATIONS))
        self.relation_heads = relation_heads
        self.relations = relations

    @property
    def needs_values(self) -> bool:
        return "v" in self.relations

    def forward(
        self,
        student: Sequence[AttentionInputs],
        teacher: Sequence[AttentionInputs],
        mask: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> AttentionKL:
        """Compute the loss of all pairs; see `AttentionKLLoss.forward`.

        Returns:
            `.per_pair` and `.per_head` hold all pairs of the first relation, then of the next.
        """
        masks = row_weights(student, teacher, self.pairs, mask)
        count = len(self.relations)
        weights = self.pair_weights or [1 / self.pairs] * self.pairs
        return self._compare(
            self._relations_of("student", student),
            self._relations_of("teacher", teacher),
            masks * count,
            [weight / count for weight in weights] * count,
            normalizer,
        )

    def logs(self, result: AttentionKL) -> dict[str, Tensor]:
        """Each relation and their mean, averaged over the pairs, and the mean times its weight.

        Returns:
            [] each, detached: "relation_q" and so on, "relation", "weighted_relation".
        """
        means = [
            mean_over_pairs(values, self.pair_weights)
            for values in result.per_pair.split(self.pairs)
        ]
        mean = torch.stack(means).mean()
        logs = {f"relation_{r}": value for r, value in zip(self.relations, means, strict=True)}
        return logs | {self.name: mean, f"weighted_{self.name}": self.weight * mean}

    def extra_repr(self) -> str:
        heads = f"relation_heads={self.relation_heads}, relations={''.join(self.relations)}"
        return super().extra_repr().replace(f"heads={self.heads}", heads)

    def _relations_of(self, side: str, inputs: Sequence[AttentionInputs]) -> list[AttentionInputs]:
        return [
            self._relation(f"{side}[{index}]", one, relation)
            for relation in self.relations
            for index, one in enumerate(inputs)
        ]

    def _relation(self, name: str, inputs: AttentionInputs, relation: str) -> AttentionInputs:
        """Attention of a tensor to itself, its heads joined and split anew."""
        x = getattr(inputs, RELATIONS[relation])
        if x is None:
            raise ValueError(
                f"{name} must hold values for the relation 'v': got none; capture them with "
                "capture_attention(..., values=True)."
            )
        joined = x.transpose(1, 2).flatten(2)  # [B, T, heads times width]
        if joined.shape[-1] % self.relation_heads:
            raise ValueError(
                f"relation_heads must divide the width of all heads: got {self.relation_heads} for "
                f"{joined.shape[-1]} in the {RELATIONS[relation]} of {name}; choose a common "
                "divisor of both models."
            )
        x = joined.unflatten(2, (self.relation_heads, -1)).transpose(1, 2)
        scale = x.shape[-1] ** -0.5
        return replace(inputs, query=x, key=x, value=None, scale=scale, softcap=None)
