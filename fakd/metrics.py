"""Scores of predictions, by scikit-learn and scipy."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef


def score(metrics: Sequence[str], truth: ArrayLike, predictions: ArrayLike) -> dict[str, float]:
    """Score predictions by name.

    Args:
        metrics: of "accuracy", "f1" (of class 1, of two), "macro_f1" (mean over classes),
            "matthews_correlation", "pearson" and "spearmanr". A correlation with a constant is 0.
        truth: [N], class indices or numbers.
        predictions: [N] likewise, or logits: [N, C] of classes, [N, 1] of a regression.

    Raises:
        ValueError: an unknown metric, no rows, or shapes that do not fit.
    """
    truth, predictions = np.asarray(truth), np.asarray(predictions)
    if predictions.ndim == 2:
        is_number = predictions.shape[1] == 1
        predictions = predictions[:, 0] if is_number else predictions.argmax(axis=1)
    if truth.shape != predictions.shape or truth.ndim != 1 or len(truth) == 0:
        raise ValueError(
            f"truth and predictions must be [N] with N > 0: got {list(truth.shape)} and "
            f"{list(predictions.shape)}; pass one prediction for each row."
        )
    for name in metrics:
        if name not in _SCORES:
            raise ValueError(
                f"metrics must be of {', '.join(map(repr, _SCORES))}: got {name!r}; choose others."
            )
    return {name: float(_SCORES[name](truth, predictions)) for name in metrics}


def perplexity(total_loss: float, tokens: int) -> float:
    """exp(total_loss / tokens), of the summed cross-entropy (in nats) of the tokens that count."""
    if tokens < 1:
        raise ValueError(f"tokens must be > 0: got {tokens}; pass rows that predict some.")
    mean = total_loss / tokens
    return math.exp(mean) if mean < 700 else math.inf  # a float ends at exp(709)


def is_greater_better(metric: str) -> bool:
    """Whether a greater value of a metric is a better one."""
    return metric != "perplexity"


def _macro_f1(truth: np.ndarray, predictions: np.ndarray) -> float:
    return f1_score(truth, predictions, average="macro", zero_division=0)


def _binary_f1(truth: np.ndarray, predictions: np.ndarray) -> float:
    if not {*truth.tolist(), *predictions.tolist()} <= {0, 1}:
        raise ValueError(
            "truth must have two classes for f1: got others than 0 and 1; choose macro_f1."
        )
    return f1_score(truth, predictions, zero_division=0)


def _correlation(
    function: Callable[[np.ndarray, np.ndarray], object],
) -> Callable[[np.ndarray, np.ndarray], float]:
    def correlate(truth: np.ndarray, predictions: np.ndarray) -> float:
        if np.ptp(truth) == 0 or np.ptp(predictions) == 0:
            return 0.0
        return function(truth, predictions).statistic

    return correlate


_SCORES = {
    "accuracy": accuracy_score,
    "f1": _binary_f1,
    "macro_f1": _macro_f1,
    "matthews_correlation": matthews_corrcoef,
    "pearson": _correlation(stats.pearsonr),
    "spearmanr": _correlation(stats.spearmanr),
}
