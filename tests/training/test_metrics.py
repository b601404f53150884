"""Scores, against values worked out by hand."""

import math

import pytest
import torch

from fakd import metrics

ALL = ("accuracy", "f1", "macro_f1", "matthews_correlation")


def test_two_classes():
    # Of class 1: two found, one missed, one wrong; of class 0: one found.
    scores = metrics.score(ALL, [1, 1, 1, 0, 0], [1, 1, 0, 1, 0])
    assert scores["accuracy"] == pytest.approx(3 / 5)
    assert scores["f1"] == pytest.approx(2 / 3)
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    # (TP TN - FP FN) / sqrt(3 * 3 * 2 * 2)
    assert scores["matthews_correlation"] == pytest.approx((2 * 1 - 1 * 1) / 6)


def test_names_and_order_are_those_asked_for():
    assert list(metrics.score(("macro_f1", "accuracy"), [0, 1], [0, 1])) == ["macro_f1", "accuracy"]


def test_numbers():
    scores = metrics.score(("pearson", "spearmanr"), [1.0, 2.0, 3.0], [1.0, 2.0, 9.0])
    assert scores["spearmanr"] == pytest.approx(1)
    assert scores["pearson"] == pytest.approx(8 / math.sqrt(2 * 38))
    assert metrics.score(("pearson", "spearmanr"), [1.0, 2.0], [5.0, 5.0]) == {
        "pearson": 0.0,
        "spearmanr": 0.0,
    }


def test_logits_are_read_as_classes_or_numbers():
    logits = torch.tensor([[0.1, 0.3, 0.2], [2.0, 1.0, 0.0]])
    assert metrics.score(("accuracy",), torch.tensor([1, 1]), logits) == {"accuracy": 0.5}
    values = torch.tensor([[1.0], [2.0], [9.0]])
    assert metrics.score(("spearmanr",), [1.0, 2.0, 3.0], values)["spearmanr"] == pytest.approx(1)


def test_unusable_calls():
    with pytest.raises(ValueError, match=r"metrics must be of 'accuracy', .*: got 'acuracy'"):
        metrics.score(("acuracy",), [0, 1], [0, 1])
    with pytest.raises(ValueError, match="f1: got others than 0 and 1; choose macro_f1"):
        metrics.score(("f1",), [0, 2], [0, 1])
    for truth, predictions in (([], []), ([0, 1], [0]), ([[0], [1]], [0, 1])):
        with pytest.raises(ValueError, match=r"truth and predictions must be \[N\] with N > 0"):
            metrics.score(("accuracy",), truth, predictions)


def test_perplexity():
    assert metrics.perplexity(3 * math.log(7), 3) == pytest.approx(7)
    assert metrics.perplexity(1e6, 3) == math.inf
    with pytest.raises(ValueError, match="tokens must be > 0: got 0"):
        metrics.perplexity(1.0, 0)


def test_direction():
    assert metrics.is_greater_better("accuracy")
    assert not metrics.is_greater_better("perplexity")
