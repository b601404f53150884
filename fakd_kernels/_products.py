"""Matrix products with float32 sums of any operands, for the engines of a GPU."""

import torch
from torch import Tensor


def is_native(a: Tensor, b: Tensor) -> bool:
    """Whether they are multiplied as they are; a CPU has no float32 result of half operands."""
    return a.dtype == b.dtype and (a.dtype == torch.float32 or a.device.type == "cuda")


def multiply(out: Tensor, a: Tensor, b: Tensor, is_added: bool = False) -> None:
    """out = a b, or out += a b.

    Half operands of one dtype go to tensor cores as they are, others are widened to float32; sums
    are in float32, what is added to included, and rounded once if `out` is not.
    """
    if not is_native(a, b):
        a, b = a.float(), b.float()
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out) if is_added else torch.mm(a, b, out=out)
    elif a.dtype == torch.float32:
        out.copy_(torch.addmm(out.float(), a, b) if is_added else torch.mm(a, b))
    elif is_added:  # a float32 sum of half operands: torch >= 2.10
        torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, out=out)
    else:
        torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)
