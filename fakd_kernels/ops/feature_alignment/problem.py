"""One call, resolved: the layer pairs, where their gradients go, and the route of each.

Every engine receives a `Problem` and fills buffers that `op.py` allocated; no engine allocates a
result. Letters: N rows (B * T), Ds and Dt the feature widths of student and teacher.
"""

from dataclasses import dataclass

from torch import Tensor

from ..._pairs import pick


@dataclass(frozen=True)
class Pair:
    """One layer pair. All tensors are 2-D with a contiguous last axis, or 1-D and contiguous."""

    student: Tensor  # [N, Ds]
    teacher: Tensor  # [N, Dt]
    projection: Tensor | None  # [Dt, Ds]
    bias: Tensor | None  # [Dt]
    row_weights: Tensor | None  # [N] float32, >= 0
    grad_student: Tensor | None  # [N, Ds] to fill, of `grad_dtype(student)`
    projection_index: int  # into Problem.grad_projections, -1 without a projection
    bias_index: int  # into Problem.grad_biases, -1 without a bias
    route: str  # "none" | "direct" | "gram"


@dataclass(frozen=True)
class Problem:
    """Sums to fill, and gradients scaled by `coefficients`.

    For pair l, with row weights w (1 where absent; rows of weight 0 are never read):

        sums[l, 0] = sum_i w_i (1 - cos_i)          sums[l, 1] = sum_i w_i distance_i
        loss       = sum_l coefficients[l, 0] sums[l, 0] + coefficients[l, 1] sums[l, 1]

    Gradients are those of `loss`. A projection or bias shared by several pairs has one gradient,
    the sum over these pairs.
    """

    pairs: list[Pair]
    coefficients: Tensor  # [L, 2] float32 (float64 for float64 inputs)
    sums: Tensor  # [L, 2] likewise, to fill
    grad_projections: list[Tensor | None]  # [Dt, Ds] each, to fill
    grad_biases: list[Tensor | None]  # [Dt] each, to fill
    is_squared: bool  # |p - t|^2 / Dt, else |p - t|
    eps: float
    # Routes were asked for by name; otherwise an engine may leave the gram route where it would be
    # less accurate than the direct one.
    is_route_forced: bool = False

    def grad_projection(self, pair: Pair) -> Tensor | None:
        """Where the gradient of the pair's projection goes, None if it is not wanted."""
        return pick(self.grad_projections, pair.projection_index)

    def grad_bias(self, pair: Pair) -> Tensor | None:
        """Where the gradient of the pair's bias goes, None if it is not wanted."""
        return pick(self.grad_biases, pair.bias_index)

    def wants_projection(self, pair: Pair) -> bool:
        return self.grad_projection(pair) is not None

    def wants_bias(self, pair: Pair) -> bool:
        return self.grad_bias(pair) is not None


def choose_route(
    route: str,
    rows: int,
    student_width: int,
    teacher_width: int,
    wants_student: bool,
    wants_projection: bool,
) -> str:
    """The cheaper of the two exact routes by counted FLOPs, unless one is forced."""
    if route != "auto":
        return route
    direct, gram = count_flops(
        rows, student_width, teacher_width, wants_student, wants_projection
    ).values()
    return "gram" if gram < direct else "direct"


def count_flops(
    rows: int,
    student_width: int,
    teacher_width: int,
    wants_student: bool,
    wants_projection: bool,
) -> dict[str, int]:
    """FLOPs of the matrix products of each route, value and the wanted gradients together.

    direct: P = X W^T; dX = dP W; dW = dP^T X.
    gram: U = T W, V = X (W^T W); dX = A V + B U costs no product; dW = W (X^T A X) + T^T (B X).
    """
    wide = 2 * rows * student_width * teacher_width
    narrow = 2 * rows * student_width**2
    square = 2 * student_width**2 * teacher_width
    return {
        "direct": wide * (1 + wants_student + wants_projection),
        "gram": (wide + narrow + square) * (1 + wants_projection),
    }
