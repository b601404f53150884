"""What the tests of `attention_kl` do alike on every engine."""

import torch
from torch import Tensor

from tests.support.accuracy import assert_accurate
from tests.support.attention_cases import AttentionInputs


def results(inputs: AttentionInputs, *, reference: bool, **options) -> dict[str, Tensor]:
    """Loss, logs, and the gradients of three times the loss."""
    if reference:
        loss, per_pair, per_head = inputs.call_reference(**options)
    else:
        result = inputs.call(**options)
        loss, per_pair, per_head = result.loss, result.per_pair, result.per_head
    leaves = {name: leaf for name, leaf in inputs.leaves.items() if leaf.requires_grad}
    grads = torch.autograd.grad(3 * loss, list(leaves.values()))
    logs = {"loss": loss, "per_pair": per_pair}
    logs |= {f"per_head[{index}]": value for index, value in enumerate(per_head)}
    return logs | dict(zip(leaves, grads, strict=True))


def check(inputs: AttentionInputs, engine: str, **options) -> None:
    """Value, logs and every gradient of one call against the float64 formula, by the rule."""
    truth = results(inputs.double(), reference=True, **options)
    eager = results(inputs, reference=True, **options)
    got = results(inputs, reference=False, engine=engine, **options)
    assert got.keys() == truth.keys()
    for name, value in got.items():
        dtype = inputs.leaves[name].dtype if name in inputs.leaves else torch.float32
        assert value.dtype == dtype
        assert_accurate(name, value, truth[name], eager[name], dtype)
