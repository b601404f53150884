"""One call, resolved: both sides, where the gradients go, and what is compared.

Letters: N tokens, V vocabulary that is compared, D hidden width (of either side).
"""

from dataclasses import dataclass

from torch import Tensor

from ..._outputs import Terms


@dataclass(frozen=True)
class Side:
    """Student or teacher: logits = hidden head^T + bias, capped as `Terms` says."""

    hidden: Tensor  # [N, D], any row stride
    head: Tensor  # [V, D], contiguous
    bias: Tensor | None  # [V]


@dataclass(frozen=True)
class Problem:
    """Sums to fill, and gradients scaled by `terms.coefficients` (see `_outputs`)."""

    student: Side
    teacher: Side
    terms: Terms
    grad_hidden: Tensor | None  # to fill, of `grad_dtype` of their tensor
    grad_head: Tensor | None
    grad_bias: Tensor | None
    sums: Tensor  # [2]; to fill
    per_token: Tensor  # [N, 2]; to fill, 0 where a token does not count
    block_bytes: int  # for the float32 logits of both sides of a block of tokens; 0: as it pleases
