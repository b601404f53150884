"""A test of the test: the accuracy rule must reject what is wrong."""

import pytest
import torch

from tests.support.accuracy import assert_accurate


@pytest.fixture
def truth():
    return torch.randn(20, 30, dtype=torch.float64)


def test_accepts_the_rounded_truth(truth):
    assert_accurate("x", truth.float(), truth, truth.float(), torch.float32)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x[:10], "shape"),
        (lambda x: x.index_put((torch.tensor(3), torch.tensor(4)), x[3, 4] + 1e-5), "worst"),
        (lambda x: x * (1 + 1e-6), "error"),
        (lambda x: x[torch.randperm(20)], "worst"),
        (lambda x: x.index_put((torch.tensor(3), torch.tensor(4)), torch.tensor(torch.nan)), "fin"),
        (lambda x: torch.zeros_like(x), "worst"),
        (lambda x: x.bfloat16().float(), "worst"),
    ],
    ids=["shape", "one-element", "drift", "swapped-rows", "nan", "zeros", "rounded-too-far"],
)
def test_rejects(truth, spoil, message):
    with pytest.raises(AssertionError, match=message):
        assert_accurate("x", spoil(truth.float()), truth, truth.float(), torch.float32)


def test_is_relative_to_the_error_of_eager(truth):
    eager = truth.float() * (1 + 1e-5)
    assert_accurate("x", truth.float() * (1 - 1e-5), truth, eager, torch.float32)
    with pytest.raises(AssertionError, match="exceeds"):
        assert_accurate("x", truth.float() * (1 - 3e-5), truth, eager, torch.float32)
