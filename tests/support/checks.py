"""Comparisons that the test files of several engines share."""

import torch

from tests.support.accuracy import assert_accurate
from tests.support.cases import FeatureInputs


def check_feature_alignment(
    inputs: FeatureInputs, *, engine: str | None, upstream: float = 3.0, **options
) -> None:
    """Value, logs and every gradient of one call against the float64 formula, by the rule."""
    truth = _run(inputs.double(), reference=True, upstream=upstream, **_formula(options))
    eager = _run(inputs, reference=True, upstream=upstream, **_formula(options))
    got = _run(inputs, reference=False, upstream=upstream, engine=engine, **options)
    assert got.keys() == truth.keys()
    for name, value in got.items():
        if name in ("loss", "cosine", "euclidean"):
            assert value.dtype == torch.float32
            assert_accurate(name, value, truth[name], eager[name], torch.float32)
        else:
            leaf = inputs.leaves[name]
            assert value.dtype == leaf.dtype
            assert_accurate(name, value, truth[name], eager[name], leaf.dtype)


def _formula(options: dict) -> dict:
    return {key: value for key, value in options.items() if key != "route"}


def _run(inputs: FeatureInputs, *, reference: bool, upstream: float, **options) -> dict:
    if reference:
        loss, cosine, euclidean = inputs.call_reference(**options)
    else:
        result = inputs.call(**options)
        loss, cosine, euclidean = result.loss, result.cosine, result.euclidean
    leaves = {name: leaf for name, leaf in inputs.leaves.items() if leaf.requires_grad}
    grads = torch.autograd.grad(loss * upstream, list(leaves.values()))
    return {"loss": loss, "cosine": cosine, "euclidean": euclidean} | dict(
        zip(leaves, grads, strict=True)
    )
