"""Products of a block of tokens with a head: what a card is asked for, and in which blocks."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fakd_kernels import _output_products as products
from fakd_kernels import _products

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


class _Card(TorchDispatchMode):
    """The products of half operands with float32 results, which torch has on CUDA only."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if function in (aten.mm.dtype_out, aten.addmm.dtype_out):
            *sums, a, b, dtype = args
            out = kwargs["out"]
            assert a.dtype == b.dtype != dtype == out.dtype == F32
            assert all(total.data_ptr() == out.data_ptr() for total in sums)
            self.names.append(function.__name__.split(".")[0])
            product = a.float() @ b.float()
            return out.add_(product) if sums else out.copy_(product)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize(
    ("hidden_dtype", "head_dtype", "names"),
    [
        (BF16, BF16, ["mm", "mm", "mm", "mm", "mm", "addmm"]),
        (F16, F16, ["mm", "mm"]),  # dS is in float32
        (BF16, F32, []),
        (F32, F16, []),
        (F32, F32, []),
    ],
)
def test_half_operands_are_multiplied_as_they_are(hidden_dtype, head_dtype, names, monkeypatch):
    """Of two blocks: logits, dH and dW. Heads that are widened are so slice by slice."""
    monkeypatch.setattr(_products, "is_native", lambda a, b: a.dtype == b.dtype)
    monkeypatch.setattr(products, "_WIDENED_BYTES", 1)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(10, 24, generator=generator).to(hidden_dtype)
    head = torch.randn(300, 24, generator=generator).to(head_dtype)
    ds = torch.randn(10, 300, generator=generator).to(BF16)
    bias = torch.zeros(300, dtype=head_dtype)
    grads = [torch.full_like(t, torch.nan) for t in (hidden, head, bias)]
    if F16 in (hidden_dtype, head_dtype):  # as `_pairs.grad_dtype` has it
        grads = [grad.float() for grad in grads]
    blocks = [slice(0, 6), slice(6, 10)]
    gradients = products.ProjectionGradients(*grads)
    buffer = products.Buffer(blocks, 300, F32, hidden)
    grad_buffer = buffer.of_gradients(gradients.logits_dtype(hidden, head))
    with _Card() as card:
        for rows in blocks:
            logits = buffer.of(rows)
            products.make_logits(logits, hidden[rows], head)
            torch.testing.assert_close(logits, hidden[rows].float() @ head.float().T)
            grad = grad_buffer.of(rows).copy_(ds[rows])
            gradients.add(grad, hidden[rows], head, rows)
        gradients.finish()
    assert card.names == names
    want = ds.float() @ head.float(), ds.float().T @ hidden.float(), ds.float().sum(0)
    for got, expected in zip(grads, want, strict=True):
        torch.testing.assert_close(got, expected.to(got.dtype))


def test_gradients_of_no_block_are_0():
    grads = torch.full((5, 3), torch.nan), torch.full((5,), torch.nan)
    products.ProjectionGradients(None, *grads).finish()
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize(
    ("tokens", "block_bytes", "blocks"),
    [
        (0, 0, []),
        (1, 0, [1]),
        (8192, 0, [1024] * 8),
        (8000, 0, [1024] * 7 + [832]),
        (1100, 0, [640, 460]),
        (1100, 1, [1] * 1100),
        (9, 5 * 8 * 128256, [5, 4]),
    ],
)
def test_blocks_of_tokens(tokens, block_bytes, blocks):
    """Of 128256 entries, 1046 tokens of both sides in 1 GiB: multiples of 128, evenly filled."""
    slices = products.token_blocks(tokens, 8 * 128256, block_bytes)
    assert [rows.stop - rows.start for rows in slices] == blocks
    assert [rows.start for rows in slices] == [sum(blocks[:i]) for i in range(len(blocks))]


@pytest.mark.parametrize(
    ("hidden", "head", "bias", "kept"),
    [
        (BF16, BF16, None, BF16),
        (BF16, BF16, BF16, BF16),
        (BF16, BF16, F32, F32),
        (BF16, F32, None, F32),
        (F16, F16, None, F32),
    ],
)
def test_dtype_of_the_gradient_of_logits(hidden, head, bias, kept):
    gradients = products.ProjectionGradients(
        *(None if dtype is None else torch.empty(1, dtype=dtype) for dtype in (None, head, bias))
    )
    tensors = (torch.empty(1, 1, dtype=dtype) for dtype in (hidden, head))
    assert gradients.logits_dtype(*tensors) == kept
