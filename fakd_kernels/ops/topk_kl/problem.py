"""One call, resolved: the student, the stored teacher, where the gradients go.

Letters: N tokens, V vocabulary, D hidden width, k stored entries per token.
"""

from dataclasses import dataclass

from torch import Tensor

from ..._outputs import Terms


@dataclass(frozen=True)
class Problem:
    """Sums to fill, and gradients scaled by `terms.coefficients` (see `_outputs`).

    The outcomes of a token that are compared are its stored entries, and, with a ghost, one more:
    any other token. Both sides are normalised over them:

        teacher  softmax(logprobs / temperature); its ghost has the logarithm of what the stored
                 probabilities leave of 1, at least 0, and 0 where the entries are all there is
        student  softmax(logits / temperature); its ghost has the log-sum-exp of the other logits

    A token without entries has no outcome (with a ghost, one): its distance is 0.
    """

    hidden: Tensor  # [N, D], any row stride
    head: Tensor  # [V, D], contiguous
    bias: Tensor | None  # [V]
    indices: Tensor  # [N, k] int64, contiguous, distinct in a row; -1: unused
    logprobs: Tensor  # [N, k] of the dtype of the arithmetic, contiguous
    has_ghost: bool  # then the temperature is 1
    terms: Terms
    grad_hidden: Tensor | None  # to fill, of `grad_dtype` of their tensor
    grad_head: Tensor | None
    grad_bias: Tensor | None
    sums: Tensor  # [2]; to fill
    per_token: Tensor  # [N, 2]; to fill, 0 where a token does not count
    block_bytes: int  # for the float32 logits of a block of tokens; 0: as it pleases
