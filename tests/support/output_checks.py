"""What the tests of linear_kl, logit_kl and topk_kl do alike."""

from collections.abc import Callable

import torch
from torch import Tensor

from tests.support.accuracy import assert_accurate
from tests.support.output_cases import OutputInputs

ENGINES = ("reference", "cpu")
LOGS = ("loss", "kl", "ce", "per_token", "tokens")


def results(inputs: OutputInputs, *, reference: bool = False, **options) -> dict[str, Tensor]:
    """Every result, and the gradients of four times the loss."""
    if reference:
        logs = dict(zip(LOGS, inputs.call_reference(**options), strict=True))
    else:
        result = inputs.call(**options)
        logs = {name: getattr(result, name) for name in LOGS}
    leaves = inputs.leaves
    grads = torch.autograd.grad(4 * logs["loss"], list(leaves.values()))
    return logs | dict(zip(leaves, grads, strict=True))


_EXPECTED: dict[tuple, tuple[dict, dict]] = {}  # the engines share them


def _expected(inputs: OutputInputs, options: dict) -> tuple[dict, dict]:
    """By the formula: the truth, and what eager makes of it. Those of listed cases are kept."""

    def by_formula(dtype: torch.dtype) -> dict[str, Tensor]:
        values = results(inputs.to(dtype), reference=True, **options)
        return {name: value.detach() for name, value in values.items()}

    key = (inputs.op, *inputs.origin, *options.items())
    if key not in _EXPECTED:
        _EXPECTED[key] = (by_formula(torch.float64), by_formula(torch.float32))
    truth, eager = _EXPECTED[key] if inputs.origin[0] else _EXPECTED.pop(key)
    return dict(truth), dict(eager)


def check(inputs: OutputInputs, engine: str, **options) -> None:
    """Hold an engine to the accuracy rule, and to more: eager has float32 logits here.

    Logits rounded to bfloat16, as models compute them, would excuse errors of 20 %. In return, half
    precision may be half as far off again as float32.
    """
    truth, eager = _expected(inputs, options)
    got = results(inputs, engine=engine, **options)
    assert got.keys() == truth.keys()
    is_counted = truth["per_token"] != 0
    assert not got["per_token"][~is_counted].any()
    for logs in (truth, eager, got):
        logs["per_token"] = logs["per_token"][is_counted]
    is_half = any(t is not None and t.itemsize == 2 for t in inputs.tensors.values())
    slack = inputs.slack * (1.5 if is_half else 1.0)
    # A mean of many tokens may be right by luck, so its error counts as theirs at least.
    typical = (eager["per_token"].double() - truth["per_token"]).abs()
    typical = typical.mean() if len(typical) else 0.0
    for name, value in got.items():
        dtype = inputs.tensors[name].dtype if name in inputs.trained else torch.float32
        assert value.dtype == dtype
        error = eager[name].to(dtype).double() - truth[name]
        if name in ("loss", "kl") and error.abs() < typical:
            error = typical
        assert_accurate(name, value, truth[name], truth[name] + slack * error, dtype)


def check_learned_weights(inputs: OutputInputs, engine: str) -> None:
    """Weights given as tensors receive the means that they multiply."""
    weights = {"kl_weight": torch.tensor(0.3), "ce_weight": torch.tensor(0.0)}
    for weight in weights.values():
        weight.requires_grad_()
    result = inputs.call(engine=engine, **weights)
    result.loss.backward()
    factor = inputs.options.get("temperature", 1.0) ** 2
    torch.testing.assert_close(weights["kl_weight"].grad, factor * result.kl)
    torch.testing.assert_close(weights["ce_weight"].grad, result.ce)
    assert all(leaf.grad is not None for leaf in inputs.leaves.values())


def check_tokens_that_do_not_count(
    make: Callable[[], OutputInputs], engine: str, value: float, **options
) -> None:
    """They may hold anything, labels included, and change nothing."""
    inputs, hostile = make(), make()
    is_masked = hostile.tensors["mask"] == 0
    away = is_masked | (hostile.tensors["labels"] == -100)
    with torch.no_grad():
        for name, tensor in hostile.tensors.items():
            if name.endswith(("_logits", "_hidden")):
                tensor.masked_fill_(away[..., None], value)
        hostile.tensors["labels"].masked_fill_(is_masked, 10**6)
    want, got = (results(each, engine=engine, **options) for each in (inputs, hostile))
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, want[name], rtol=0, atol=0)


def check_entries_of_probability_0(
    make: Callable[[], OutputInputs], is_away: Tensor, engine: str, **options
) -> None:
    """Logits that are -inf on both sides are as if they were not there; `is_away` [V]."""
    whole, part = make(), make()
    with torch.no_grad():
        for name in ("student_logits", "teacher_logits"):
            whole.tensors[name].masked_fill_(is_away, -torch.inf)
            part.tensors[name] = part.tensors[name][..., ~is_away].detach()
    labels = whole.tensors["labels"]
    labels[is_away[labels.clamp_min(0)]] = -100
    kept = (~is_away).cumsum(0) - 1
    part.tensors["labels"] = torch.where(labels < 0, labels, kept[labels.clamp_min(0)])
    part.tensors["student_logits"].requires_grad_()
    got, want = (results(inputs, engine=engine, **options) for inputs in (whole, part))
    grad = got["student_logits"]
    assert not grad[..., is_away].any()
    got["student_logits"] = grad[..., ~is_away]
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-6)
