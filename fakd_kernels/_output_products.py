"""Products between hidden states, heads and logits of a block of tokens, in float32, on a GPU.

Half operands of one dtype go to tensor cores as they are, with sums and results in float32
(`out_dtype`): logits are never rounded to half precision. Other operands are widened to float32, a
head slice by slice, and multiplied as torch multiplies float32 ("tf32" where torch allows it).

The gradient of the logits, dS, is float32 and replaces them, block by block. Where all that it
makes is bfloat16 it is bfloat16 as well, and kept for a part of the tokens, many blocks: dH and dW
are then one product each of a part, and no sum of V x D in float32 exists. That sum would take
4 V D bytes, and 8 V D of traffic for every block; dS of 2 D tokens takes as many. Up to 2 D tokens
are one part; of several, at most 8, partial sums of dW are rounded. Relative errors, of 2048
tokens, 4096 entries, 128 wide, logits of standard deviation 3, products in float32 (CPU, 2026-11):

    dS in bfloat16, 1 part    dH 2.2e-3, dW 2.2e-3
                    2 parts             dW 2.5e-3
                    8 parts             dW 3.7e-3
    dS in float32             dH 1.7e-3, dW 1.7e-3, all of it the rounding of dH and dW
    logits in bfloat16        dH 1.1e-2, dW 1.2e-2, as eager has them

float16 has too small a range for dS, so that its products are in float32 as well.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import _products as products

_BLOCK_BYTES = 512 << 20
_LEAST_TOKENS = 512
_WIDENED_BYTES = 64 << 20  # of a slice of a head in float32
_ROWS = 128  # of a tile of a matrix product: a block of tokens is a multiple of it
_MOST_PARTS = 8
# Of a smaller dW cuBLAS may add pieces of a sum in bfloat16, and its float32 sum costs little.
_LARGE_HEAD = 1 << 24


def token_blocks(tokens: int, token_bytes: int, block_bytes: int) -> list[slice]:
    """Blocks of about as many tokens, up to `block_bytes`; if 0, up to 512 MiB or 512 tokens.

    Tokens per block decide the speed: a head is read once for each block, at 2 FLOPs per token and
    entry of it. Products are bound by arithmetic above 300 half-precision FLOPs a byte on an H100;
    512 tokens make that 512, with two sides of 128256 entries in 501 MiB.
    """
    if block_bytes:
        most = max(1, block_bytes // token_bytes)
    else:
        most = max(_LEAST_TOKENS, _BLOCK_BYTES // token_bytes)
    count = max(1, -(-tokens // most))
    block = -(-tokens // count)
    if most >= _ROWS:
        block = min(most // _ROWS, -(-block // _ROWS)) * _ROWS
    return [slice(begin, min(tokens, begin + block)) for begin in range(0, tokens, max(1, block))]


def padded(vocab: int) -> int:
    """Row stride of a block of logits: whole vectors of 16 entries."""
    return -(-vocab // 16) * 16


def logits_buffer(runs: list[slice], vocab: int, dtype: torch.dtype, like: Tensor) -> Tensor:
    """[R, V] for the longest of these runs of tokens; rows begin `padded(V)` apart."""
    tokens = max((run.stop - run.start for run in runs), default=0)
    return like.new_empty((tokens, padded(vocab)), dtype=dtype)[:, :vocab]


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


class ProjectionGradients:
    """Gradients of hidden [N, D], head [V, D] and bias [V], from dS of one block after the other.

    That of the bias, a long sum, adds up in float64; for the head see the top.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Tensor,
        grads: tuple[Tensor | None, Tensor | None, Tensor | None],
        blocks: list[slice],
    ) -> None:
        """Take what is differentiated and where its gradients go.

        Args:
            hidden: [N, D], 0 where tokens do not count.
            head: [V, D]
            grads: of hidden, head and bias; None: not wanted.
            blocks: the tokens that `add` will be called with.
        """
        self.hidden, self.head, self.blocks = hidden, head, blocks
        self.grad_hidden, self.grad_head, self.grad_bias = grads
        wanted = [grad for grad in grads if grad is not None]
        self.is_wanted = bool(wanted)
        self.is_half = all(t.dtype == torch.bfloat16 for t in (hidden, head, *wanted))
        self.parts = _parts(blocks, head.shape[1] if self._is_kept else 0)
        self.is_begun = False
        if self.is_wanted and self.is_half:
            self.kept = logits_buffer(self.parts, len(head), torch.bfloat16, hidden)
        if self.grad_head is not None:
            self.head_total = self.grad_head if self._is_kept else _float32(self.grad_head)
        if self.grad_bias is not None:
            self.bias_total = torch.zeros_like(self.grad_bias, dtype=torch.float64)

    @property
    def _is_kept(self) -> bool:
        """Whether dS waits for a product that makes dW of it in its own dtype."""
        return self.is_half and self.grad_head is not None and self.head.numel() >= _LARGE_HEAD

    def room(self, rows: slice, logits: Tensor) -> Tensor | None:
        """Where dS [R, V] of a block goes, which may be its logits; None: it is not wanted."""
        if not (self.is_wanted and self.is_half):
            return logits if self.is_wanted else None
        begin = self._part_of(rows).start
        return self.kept[rows.start - begin : rows.stop - begin]

    def add(self, rows: slice, grad: Tensor) -> None:
        """A block whose dS, in its room, is filled."""
        if self.grad_bias is not None:
            self.bias_total += grad.sum(0, dtype=torch.float64)
        if self.is_half:
            part = self._part_of(rows)
            if rows.stop < part.stop:
                return
            rows, grad = part, self.kept[: part.stop - part.start]
        if self.grad_hidden is not None:
            out = self.grad_hidden[rows]
            product = _float32(out)
            for piece in _slices(self.head, grad):
                is_added = piece.start > 0
                products.multiply(product, grad[:, piece], self.head[piece], is_added)
            if product is not out:
                out.copy_(product)
        if self.grad_head is not None:
            products.multiply(self.head_total, grad.T, self.hidden[rows], self.is_begun)
            self.is_begun = True

    def _part_of(self, rows: slice) -> slice:
        return next(part for part in self.parts if rows.stop <= part.stop)

    def finish(self) -> None:
        if self.grad_bias is not None:
            self.grad_bias.copy_(self.bias_total)
        if self.grad_head is not None and not self.is_begun:
            self.grad_head.zero_()
        elif self.grad_head is not None and self.head_total is not self.grad_head:
            self.grad_head.copy_(self.head_total)


def _parts(blocks: list[slice], width: int) -> list[slice]:
    """Runs of blocks of up to 2 * width tokens, or of more where these were too many runs."""
    if not blocks or width == 0:
        return blocks
    count = min(_MOST_PARTS, -(-blocks[-1].stop // (2 * width)))
    step = -(-len(blocks) // count)
    runs = [blocks[begin : begin + step] for begin in range(0, len(blocks), step)]
    return [slice(run[0].start, run[-1].stop) for run in runs]


def _float32(out: Tensor) -> Tensor:
    """Memory for a float32 result that goes to `out`: its own, if that is float32."""
    return out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
