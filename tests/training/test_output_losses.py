"""The modules of output and map losses: they pass on what they own, and refuse what cannot be."""

import pytest
import torch

from fakd import AttentionMapKLLoss, LinearKLLoss, LogitKLLoss, TopKKLLoss
from fakd_kernels import attention_map_kl, linear_kl, logit_kl, topk_kl


def heads(vocabulary=50):
    generator = torch.Generator().manual_seed(0)
    sizes = ((6, 8), (vocabulary, 8), (6, 12), (vocabulary, 12))
    return [torch.randn(*size, generator=generator) for size in sizes]


def test_linear_loss_is_the_op():
    tensors, labels = heads(), torch.arange(6)
    module = LinearKLLoss(
        temperature=2.0, distance="jsd", jsd_beta=0.3, kl_weight=0.5, ce_weight=0.2, block_bytes=400
    )
    got = module(*tensors, labels=labels, mask=torch.arange(6) > 1, student_softcap=5.0)
    want = linear_kl(
        *tensors, labels=labels, mask=torch.arange(6) > 1, temperature=2.0, distance="jsd",
        jsd_beta=0.3, kl_weight=0.5, ce_weight=0.2, student_softcap=5.0,
    )  # fmt: skip
    torch.testing.assert_close(got.loss, want.loss)
    logs = module.logs(got)
    torch.testing.assert_close(logs["weighted_soft"] + logs["weighted_task"], got.loss)
    assert "task" not in LinearKLLoss().logs(got)


def test_logit_loss_is_the_op():
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    module = LogitKLLoss(temperature=3.0, scale_by_temperature_squared=False)
    got = module(student, teacher)
    want = logit_kl(student, teacher, temperature=3.0, scale_by_temperature_squared=False)
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(module.logs(got)["weighted_soft"], got.loss)


@pytest.mark.parametrize("ghost", [True, False])
def test_top_loss_is_the_op(ghost):
    student_hidden, student_head, *_ = heads()
    logprobs, indices = torch.randn(6, 50).log_softmax(-1).topk(4)
    got = TopKKLLoss(ghost=ghost)(student_hidden, student_head, indices, logprobs)
    want = topk_kl(student_hidden, student_head, indices, logprobs, ghost=ghost)
    torch.testing.assert_close(got.loss, want.loss)


def test_map_loss_is_the_op():
    maps = [[torch.randn(2, 3, 5, 5).softmax(-1) for _ in range(2)] for _ in range(2)]
    module = AttentionMapKLLoss(2, weight=0.5, heads="mean", distance="mse")
    got = module(*maps, mask=torch.ones(2, 5).bool())
    want = attention_map_kl(*maps, weight=0.5, heads="mean", distance="mse")
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(module.logs(got)["weighted_attention_map"], got.loss)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearKLLoss(temperature=0.0), "temperature must be finite and > 0"),
        (lambda: LinearKLLoss(distance="l2"), "distance must be one of"),
        (lambda: LogitKLLoss(kl_weight=-1.0), "kl_weight must be a finite number >= 0"),
        (lambda: LogitKLLoss(kl_weight=0.0), "must not both be 0"),
        (lambda: LinearKLLoss(jsd_beta=1.0), "jsd_beta must be between 0 and 1"),
        (lambda: TopKKLLoss(distance="jsd"), "must be 'kl' for a stored teacher"),
        (lambda: AttentionMapKLLoss(1, inputs="logits"), "inputs must be one of"),
        (lambda: AttentionMapKLLoss(1)([], []), "student_maps must have one entry per layer pair"),
    ],
)
def test_settings_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()
