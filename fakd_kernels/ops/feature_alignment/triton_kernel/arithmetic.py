"""In which precision the products of a group of pairs are taken.

Products accumulate in float32. Half operands multiply natively. Float32 operands go to tensor cores
as tf32x3, full float32 accuracy ("tf32" where torch allows it). Where one operand is a float32
intermediate and the other is half:

- dP and rows scaled by a or b are rounded to bfloat16 as eager autograd rounds dP: their errors
  are random and average out in a gradient of that dtype.
- G and X^T diag(a) X are kept as two bfloat16 terms, 16 bits: one rounding of G would be a
  systematic error of every row's |p|^2, which the value (float32) would show.
- float16 has too small a range for either, so both operands become tf32, whose 10 bits hold
  float16 exactly; tf32x3 for G.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Arithmetic:
    """Dtypes of a group of pairs, and how each kind of product is carried out (see the top)."""

    x: torch.dtype
    t: torch.dtype
    w: torch.dtype
    raw: str  # precision of products of inputs
    mixed: str  # of an input with dP or a scaled row
    gram: str  # of an input with G or X^T diag(a) X
    middle: torch.dtype  # of dP
    terms: int  # bfloat16 terms of G and X^T diag(a) X, 1 for float32

    @staticmethod
    def of(x: torch.dtype, t: torch.dtype, w: torch.dtype, is_tf32_allowed: bool) -> "Arithmetic":
        kinds = {x, t, w}
        if kinds == {torch.bfloat16}:
            return Arithmetic(x, t, w, "native", "native", "native", torch.bfloat16, 2)
        if kinds == {torch.float16}:
            return Arithmetic(x, t, w, "native", "tf32", "tf32x3", torch.float32, 1)
        full = "tf32" if is_tf32_allowed else "tf32x3"
        return Arithmetic(x, t, w, full, full, full, torch.float32, 1)

    @property
    def is_half(self) -> bool:
        return self.raw == "native"

    @property
    def cancelled(self) -> float:
        """The share of |p|^2 + |t|^2 below which |p - t|^2 = r1 - 2 r2 + r3 is not trusted.

        Measured against the accuracy rule: in float32 the errors of U and V, twice those of an
        eager P, reach 0.94 of what it allows where the share is 1/4 and 0.5 where it is 0.6. Eager
        half precision rounds P itself: there, at 1/64, they stay below a fifth of what it allows.
        """
        return 1 / 64 if self.is_half else 1 / 4

    @property
    def gram_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.terms == 2 else torch.float32
