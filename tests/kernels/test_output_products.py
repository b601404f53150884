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
    ("hidden_dtype", "head_dtype", "large", "names"),
    [
        # Of three blocks: logits; of two parts: dH in float32, dW.
        (BF16, BF16, True, ["mm", "mm", "mm", "mm", "mm"]),
        # Of three blocks: logits, dH and dW, whose sum is in float32.
        (BF16, BF16, False, [*["mm"] * 3, *["mm", "mm", "addmm"] * 2]),
        (F16, F16, False, ["mm"] * 3),  # dS is in float32
        (BF16, F32, False, []),
        (F32, F16, False, []),
        (F32, F32, False, []),
    ],
)
def test_half_operands_are_multiplied_as_they_are(
    hidden_dtype, head_dtype, large, names, monkeypatch
):
    """Heads that are widened are so slice by slice."""
    monkeypatch.setattr(_products, "is_native", lambda a, b: a.dtype == b.dtype)
    monkeypatch.setattr(products, "_WIDENED_BYTES", 1)
    monkeypatch.setattr(products, "_LARGE_HEAD", 1 if large else 1 << 24)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 16, generator=generator).to(hidden_dtype)
    head = torch.randn(300, 16, generator=generator).to(head_dtype)
    ds = torch.randn(50, 300, generator=generator).to(BF16)
    bias = torch.zeros(300, dtype=head_dtype)
    grads = [torch.full_like(t, torch.nan) for t in (hidden, head, bias)]
    if F16 in (hidden_dtype, head_dtype):  # as `_pairs.grad_dtype` has it
        grads = [grad.float() for grad in grads]
    blocks = [slice(0, 16), slice(16, 32), slice(32, 50)]
    gradients = products.ProjectionGradients(hidden, head, tuple(grads), blocks)
    assert gradients.parts == ([slice(0, 32), slice(32, 50)] if large else blocks)
    memory = products.logits_buffer(blocks, 300, F32, hidden)
    with _Card() as card:
        for rows in blocks:
            logits = memory[: rows.stop - rows.start]
            products.make_logits(logits, hidden[rows], head)
            torch.testing.assert_close(logits, hidden[rows].float() @ head.float().T)
            grad = gradients.room(rows, logits)
            assert (grad is logits) == ({hidden_dtype, head_dtype} != {BF16})
            gradients.add(rows, grad.copy_(ds[rows]))
        gradients.finish()
    assert card.names == names
    of_parts = [ds[rows].float().T @ hidden[rows].float() for rows in gradients.parts]
    want_head = of_parts[0].to(grads[1].dtype) + of_parts[1] if large else sum(of_parts)
    want = ds.float() @ head.float(), want_head, ds.float().sum(0)
    for got, expected in zip(grads, want, strict=True):
        torch.testing.assert_close(got, expected.to(got.dtype))


def test_gradients_of_no_block_are_0():
    hidden, head = torch.empty(0, 3), torch.empty(5, 3)
    grads = torch.full((5, 3), torch.nan), torch.full((5,), torch.nan)
    products.ProjectionGradients(hidden, head, (None, *grads), []).finish()
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize(
    ("tokens", "block_bytes", "blocks"),
    [
        (0, 0, []),
        (1, 0, [1]),
        (4096, 0, [512] * 8),
        (4000, 0, [512] * 7 + [416]),
        (600, 0, [384, 216]),
        (1100, 1, [1] * 1100),
        (9, 5 * 8 * 128256, [5, 4]),
    ],
)
def test_blocks_of_tokens(tokens, block_bytes, blocks):
    """Of 128256 entries, 523 tokens of both sides in 512 MiB: multiples of 128, evenly filled."""
    slices = products.token_blocks(tokens, 8 * 128256, block_bytes)
    assert [rows.stop - rows.start for rows in slices] == blocks
    assert [rows.start for rows in slices] == [sum(blocks[:i]) for i in range(len(blocks))]


def test_a_block_has_512_tokens_however_large_the_vocabulary():
    assert products.token_blocks(1024, 8 * 262144, 0) == [slice(0, 512), slice(512, 1024)]


@pytest.mark.parametrize(
    ("tokens", "parts"),
    [(4096, 1), (4097, 2), (8192, 2), (32768, 8), (65536, 8)],
)
def test_parts_hold_twice_as_many_tokens_as_a_state_is_wide(tokens, parts, monkeypatch):
    """8192 tokens of a head of 128256 x 2048: dS as large as a float32 sum of dW would be."""
    hidden = torch.empty(tokens, 2048, dtype=BF16, device="meta")
    head = torch.empty(128256, 2048, dtype=BF16, device="meta")
    blocks = products.token_blocks(tokens, 8 * 128256, 0)
    gradients = products.ProjectionGradients(hidden, head, (None, head, None), blocks)
    assert len(gradients.parts) == parts
    assert gradients.parts[-1].stop == tokens
    if tokens <= 8 * 4096:
        assert gradients.kept.nbytes <= 4 * head.numel() + 2 * 512 * 128256


@pytest.mark.parametrize(
    ("hidden", "head", "bias", "is_half"),
    [
        (BF16, BF16, None, True),
        (BF16, BF16, BF16, True),
        (BF16, BF16, F32, False),
        (BF16, F32, None, False),
        (F16, F16, None, False),
    ],
)
def test_dtype_of_the_gradient_of_logits(hidden, head, bias, is_half):
    tensors = (torch.empty(1, 1, dtype=dtype) for dtype in (hidden, head))
    grads = (None if dtype is None else torch.empty(1, dtype=dtype) for dtype in (None, head, bias))
    gradients = products.ProjectionGradients(*tensors, tuple(grads), [slice(0, 1)])
    logits = torch.empty(1, 1)
    assert (gradients.room(slice(0, 1), logits) is not logits) == is_half
