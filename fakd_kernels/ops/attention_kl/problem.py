"""One call, resolved: the layer pairs, where their gradients go, and what is compared.

Letters: B batch, T tokens, H query heads and Hkv key heads (of either side), K head width.
"""

from dataclasses import dataclass

from torch import Tensor

from ..._attention import key_range


@dataclass(frozen=True)
class Side:
    """Student or teacher of one layer pair: scores = softcap(scale * q.k) / temperature."""

    q: Tensor  # [B, H, T, K]
    k: Tensor  # [B, Hkv, T, K], Hkv divides H
    scale: float
    softcap: float | None


@dataclass(frozen=True)
class Pair:
    """One layer pair."""

    student: Side
    teacher: Side
    row_weights: Tensor | None  # [B, T] float32, >= 0: of query rows; keys of weight 0 are masked
    is_causal: bool
    window: int | None  # keys with |i - j| < window
    teacher_heads: list[int] | None  # the teacher head of every student head; None: heads averaged
    grad_q: Tensor | None  # to fill, of `grad_dtype(student.q)`
    grad_k: Tensor | None
    sums: Tensor  # [H], or [1] where heads are averaged; to fill

    def key_range(self, begin: int, end: int) -> tuple[int, int]:
        """The keys that some of the query rows [begin, end) may attend to."""
        return key_range(begin, end, self.student.q.shape[2], self.is_causal, self.window)


@dataclass(frozen=True)
class Problem:
    """Sums to fill, and gradients scaled by `coefficients`.

    For pair l with row weights w (1 where absent):

        sums_l[h] = sum over b, i of w[b, i] distance(A_T[b, h', i, :], A_S[b, h, i, :])
        loss      = sum_l coefficients[l] sum_h sums_l[h]
    """

    pairs: list[Pair]
    coefficients: Tensor  # [L] float32 (float64 for float64 inputs)
    sums: Tensor  # of all pairs, whose own are its views
    temperature: float
    distance: str  # one of `_attention.DISTANCES`
