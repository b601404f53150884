"""What the cost is measured with: the eager twin, the clock and the memory of a process."""

import sys

import pytest
import torch

from fakd import FeatureAlignmentLoss
from fakd.measure import (
    EagerFeatureAlignmentLoss,
    Shape,
    interleaved_medians,
    loss_call,
    loss_peak_bytes,
)

SHAPE = Shape(rows=2, tokens=5, student_width=8, teacher_width=12, pairs=2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"euclidean": "distance", "cosine_weight": 0.3},
        {"projection": "shared", "bias": False},
        {"pair_weights": [0.5, 2.0]},
    ],
)
def test_eager_twin_computes_the_same(options):
    loss = FeatureAlignmentLoss(8, 12, 2, **options)
    twin = EagerFeatureAlignmentLoss.like(loss)
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (
        [torch.randn(2, 5, width, generator=generator) for _ in range(2)] for width in (8, 12)
    )
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    for got, expected in zip(
        vars(loss(ours, theirs, mask)).values(),
        vars(twin(ours, theirs, mask)).values(),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)
    fused, eager = (
        torch.autograd.grad(module(ours, theirs, mask).loss, list(module.parameters()))
        for module in (loss, twin)
    )
    torch.testing.assert_close(fused, eager)


def test_calls_take_turns():
    turns = []
    medians = interleaved_medians(
        {"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, rounds=3
    )
    assert turns == ["a", "b"] * 4  # once to warm up
    assert all(0 <= value < 1000 for value in medians.values())


@pytest.mark.parametrize("kind", ["fused", "eager"])
def test_loss_call_gives_every_gradient(kind):
    grads = loss_call(kind, SHAPE)()
    assert [tuple(grad.shape) for grad in grads] == [(2, 5, 8)] * 2 + [(12, 8), (12,)] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_peak_memory_sees_the_intermediates():
    shape = Shape(rows=64, tokens=64, student_width=16, teacher_width=512, pairs=1)
    projected_bytes = 64 * 64 * 512 * 4
    assert loss_peak_bytes("eager", shape) > projected_bytes
    assert loss_peak_bytes("fused", shape) < 0.5 * loss_peak_bytes("eager", shape)
