"""One call, resolved: the maps of every layer pair, where their gradients go, what is compared.

Letters: B batch, T tokens, H student heads and Ht teacher heads.
"""

from dataclasses import dataclass

from torch import Tensor

from ..._attention import key_range

INPUTS = ("probabilities", "scores")
# Smaller probabilities count as this one, whose logarithm float32 still holds.
LEAST = 2.0**-126


@dataclass(frozen=True)
class Pair:
    """One layer pair."""

    student: Tensor  # [B, H, T, T]
    teacher: Tensor  # [B, Ht, T, T]
    row_weights: Tensor | None  # [B, T] float32, >= 0: of query rows; keys of weight 0 are masked
    is_causal: bool
    window: int | None  # keys with |i - j| < window
    teacher_heads: list[int] | None  # the teacher head of every student head; None: heads averaged
    grad: Tensor | None  # to fill, of `grad_dtype(student)`
    sums: Tensor  # [H], or [1] where heads are averaged; to fill

    def key_range(self, begin: int, end: int) -> tuple[int, int]:
        """The keys that some of the query rows [begin, end) may attend to."""
        return key_range(begin, end, self.student.shape[2], self.is_causal, self.window)


@dataclass(frozen=True)
class Problem:
    """Sums to fill, and gradients scaled by `coefficients`, as in `attention_kl`."""

    pairs: list[Pair]
    coefficients: Tensor  # [L] float32 (float64 for float64 inputs)
    sums: Tensor  # of all pairs, whose own are its views
    are_scores: bool
    temperature: float  # of scores
    distance: str  # one of `_attention.DISTANCES`
