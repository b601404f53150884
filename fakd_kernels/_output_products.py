"""Products between hidden states, heads and logits of a block of tokens, in float32, on a GPU.

Half operands of one dtype go to tensor cores as they are, with sums and results in float32
(`out_dtype`): logits are never rounded to half precision. Other operands are widened to float32, a
head slice by slice, and multiplied as torch multiplies float32 ("tf32" where torch allows it).

The gradient of the logits, dS, is float32, but bfloat16 where all that it makes is bfloat16: its
rounding adds little to that of the results. Their relative error, of 512 tokens, 4096 entries, 128
wide, logits of standard deviation 3, products in float32 (CPU, 2026-11):

    dS in bfloat16    dH 2.0e-3, dW 2.1e-3
    dS in float32     dH 1.7e-3, dW 1.7e-3, which is all that the rounding of dH and dW makes
    eager             dH 8.2e-3, dW 9.1e-3, from logits in bfloat16

float16 has too small a range for dS, so that its products are in float32 as well.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import _products as products

_BLOCK_BYTES = 1 << 30
_WIDENED_BYTES = 64 << 20  # of a slice of a head in float32
_ROWS = 128  # of a tile of a matrix product: a block of tokens is a multiple of it


def token_blocks(tokens: int, token_bytes: int, block_bytes: int) -> list[slice]:
    """Blocks of about as many tokens, up to `block_bytes`; 1 GiB if 0.

    Tokens per block decide the speed: a head is read once for each block, at 2 FLOPs per token and
    entry of it. Products are bound by arithmetic above 300 half-precision FLOPs a byte on an H100;
    1 GiB makes that 1024 of 1046 tokens for two sides of 128256 entries.
    """
    most = max(1, (block_bytes or _BLOCK_BYTES) // token_bytes)
    count = max(1, -(-tokens // most))
    block = -(-tokens // count)
    if most >= _ROWS:
        block = min(most // _ROWS, -(-block // _ROWS)) * _ROWS
    return [slice(begin, min(tokens, begin + block)) for begin in range(0, tokens, max(1, block))]


def padded(vocab: int) -> int:
    """Row stride of a block of logits: whole vectors of 16 entries."""
    return -(-vocab // 16) * 16


class Buffer:
    """Memory for the logits of a block of tokens, used by one block after the other."""

    def __init__(self, blocks: list[slice], vocab: int, dtype: torch.dtype, like: Tensor) -> None:
        rows = max((block.stop - block.start for block in blocks), default=0)
        self.vocab = vocab
        self.memory = like.new_empty((rows, padded(vocab)), dtype=dtype)

    def of(self, rows: slice) -> Tensor:
        """[R, V]"""
        return self.memory[: rows.stop - rows.start, : self.vocab]

    def of_gradients(self, dtype: torch.dtype) -> "Buffer":
        """For their gradients: itself, if these are float32 as well."""
        if dtype == self.memory.dtype:
            return self
        block = slice(0, len(self.memory))
        return Buffer([block], self.vocab, dtype, self.memory)


def _slices(head: Tensor, other: Tensor) -> Iterator[slice]:
    """Rows of a head that are multiplied at a time: all, unless they are widened."""
    vocab, width = head.shape
    step = vocab
    if head.dtype != torch.float32 and not products.is_native(head, other):
        step = max(_ROWS, _WIDENED_BYTES // (4 * max(1, width)))
    for begin in range(0, vocab, step):
        yield slice(begin, min(vocab, begin + step))


def make_logits(out: Tensor, hidden: Tensor, head: Tensor) -> None:
    """out [R, V] = hidden [R, D] head^T."""
    for part in _slices(head, hidden):
        products.multiply(out[:, part], hidden, head[part].T)


def _float32(out: Tensor) -> Tensor:
    """Memory for a float32 result that goes to `out`: its own, if that is float32."""
    return out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)


class ProjectionGradients:
    """Gradients of hidden [N, D], head [V, D] and bias [V], from dS of one block after the other.

    That of the head adds up in float32, in its own buffer if it is float32, and by the product
    itself, so that no second sum of V x D exists; that of the bias, a long sum, in float64.
    """

    def __init__(self, hidden: Tensor | None, head: Tensor | None, bias: Tensor | None) -> None:
        self.hidden, self.head, self.bias = hidden, head, bias
        self.is_wanted = any(grad is not None for grad in (hidden, head, bias))
        self.is_begun = False
        if head is not None:
            self.head_total = _float32(head)
        if bias is not None:
            self.bias_total = torch.zeros_like(bias, dtype=torch.float64)

    def logits_dtype(self, hidden: Tensor, head: Tensor) -> torch.dtype:
        """What dS is kept in, see the top, for products with these."""
        wanted = [grad for grad in (self.hidden, self.head, self.bias) if grad is not None]
        is_half = all(t.dtype == torch.bfloat16 for t in (hidden, head, *wanted))
        return torch.bfloat16 if is_half else torch.float32

    def add(self, grad: Tensor, hidden: Tensor, head: Tensor, rows: slice) -> None:
        """One block: grad [R, V] of its logits; hidden [R, D], 0 where tokens do not count."""
        if self.hidden is not None:
            out = self.hidden[rows]
            product = _float32(out)
            for part in _slices(head, grad):
                products.multiply(product, grad[:, part], head[part], is_added=part.start > 0)
            if product is not out:
                out.copy_(product)
        if self.head is not None:
            products.multiply(self.head_total, grad.T, hidden, is_added=self.is_begun)
            self.is_begun = True
        if self.bias is not None:
            self.bias_total += grad.sum(0, dtype=torch.float64)

    def finish(self) -> None:
        if self.bias is not None:
            self.bias.copy_(self.bias_total)
        if self.head is not None and not self.is_begun:
            self.head.zero_()
        elif self.head is not None and self.head_total is not self.head:
            self.head.copy_(self.head_total)
