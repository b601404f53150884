"""One call, resolved: both sides' logits, where the gradient goes, and what is compared.

Letters: N tokens, V vocabulary that is compared.
"""

from dataclasses import dataclass

from torch import Tensor

from ..._outputs import Terms


@dataclass(frozen=True)
class Problem:
    """Sums to fill, and a gradient scaled by `terms.coefficients` (see `_outputs`)."""

    student: Tensor  # [N, V], any row stride
    teacher: Tensor  # [N, V], any row stride
    terms: Terms
    grad: Tensor | None  # [N, V], any row stride; to fill, of `grad_dtype(student)`
    sums: Tensor  # [2]; to fill
    per_token: Tensor  # [N, 2]; to fill, 0 where a token does not count
