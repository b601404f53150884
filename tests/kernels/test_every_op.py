"""What all ops do with learned weights, several losses at once, forward mode, empty inputs."""

import pytest
import torch

from fakd_kernels import (
    attention_kl,
    attention_map_kl,
    feature_alignment,
    linear_kl,
    logit_kl,
    topk_kl,
)

ENGINES = ("reference", "cpu")
_HEAD, _LOGPROBS = torch.randn(5, 8), torch.full((4, 2), -2.0)
# The loss of a student [4, 8], or of as many rows as it has, with a learned weight.
CALLS = {
    "feature_alignment": lambda x, weight, engine: feature_alignment(
        x, x.detach() + 1, cosine_weight=weight, euclidean_weight=0.0, engine=engine
    ),
    "attention_kl": lambda x, weight, engine: attention_kl(
        *(t.view(1, -1, 2, 8).transpose(1, 2) for t in (x, x, x.detach() + 1, 2 * x.detach())),
        weight=weight,
        engine=engine,
    ),
    "attention_map_kl": lambda x, weight, engine: attention_map_kl(
        x.view(-1, 2, 2, 4)[..., ::2],
        x.detach().view(-1, 2, 2, 4)[..., :2] * 2,
        inputs="scores",
        weight=weight,
        engine=engine,
    ),
    "linear_kl": lambda x, weight, engine: linear_kl(
        x, _HEAD, x.detach() + 1, _HEAD + 1, kl_weight=weight, engine=engine
    ),
    "logit_kl": lambda x, weight, engine: logit_kl(
        x, 2 * x.detach(), kl_weight=weight, engine=engine
    ),
    "topk_kl": lambda x, weight, engine: topk_kl(
        x,
        _HEAD,
        torch.tensor([[0, 3]]).expand(len(x), 2),
        _LOGPROBS[: len(x)],
        kl_weight=weight,
        ghost=True,
        engine=engine,
    ),
}
every_op = pytest.mark.parametrize("op", CALLS)
every_engine = pytest.mark.parametrize("engine", ENGINES)


@every_op
@every_engine
def test_a_weight_may_be_all_that_is_learned(op, engine):
    weight = torch.tensor(1.0, requires_grad=True)
    loss = CALLS[op](torch.randn(4, 8), weight, engine).loss
    (grad,) = torch.autograd.grad(loss * 3, weight)
    torch.testing.assert_close(grad, 3 * loss.detach())


@every_op
def test_several_losses_at_once(op):
    student = torch.randn(4, 8, requires_grad=True)
    factors = torch.tensor([1.0, -2.0])
    loss = CALLS[op](student, 1.0, None).loss
    (once,) = torch.autograd.grad(loss, student, retain_graph=True)
    (batch,) = torch.autograd.grad(loss, student, factors, is_grads_batched=True)
    torch.testing.assert_close(batch, factors[:, None, None] * once)
    loss = CALLS[op](student, 1.0, None).loss
    batch = torch.vmap(lambda factor: torch.autograd.grad(loss, student, factor)[0])(factors)
    torch.testing.assert_close(batch, factors[:, None, None] * once)


@every_op
def test_forward_mode_is_refused_in_words(op):
    student = torch.randn(4, 8)
    with pytest.raises(RuntimeError, match="forward-mode derivatives are not available"):
        torch.func.jvp(lambda x: CALLS[op](x, 1.0, None).loss, (student,), (student,))


@every_op
@every_engine
def test_no_rows_of_any_stride(op, engine):
    """torch's contiguous() keeps the strides of a tensor without elements."""
    student = torch.randn(0, 16)[:, ::2].requires_grad_()
    loss = CALLS[op](student, 1.0, engine).loss
    assert loss == 0
    (grad,) = torch.autograd.grad(loss, student)
    assert grad.shape == (0, 8)
