"""Output alignment inside the Distiller: heads, shift and padding are right by construction."""

import copy

import pytest
import torch
import torch.nn.functional as F

from fakd import AttentionKLLoss, DistillConfig, Distiller, FeatureAlignmentLoss
from fakd.losses import LinearKLLoss, LogitKLLoss, TopKKLLoss
from fakd.terms import build_losses
from tests.support.models import Adapted, tiny_batch, tiny_model
from tests.training.test_lm_head import FAMILIES, causal_lm


def lm_batch(side: str = "right") -> dict:
    batch = tiny_batch(3, 9)
    if side == "left":
        batch = {name: value.flip(1) for name, value in batch.items()}
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_has_no_loss_and_no_gradient(family, side):
    teacher = causal_lm(family)
    distiller = Distiller(teacher, copy.deepcopy(teacher), output=LinearKLLoss(temperature=2.0))
    loss = distiller(**lm_batch(side)).loss
    loss.backward()
    assert abs(loss.item()) < 1e-6
    for name, parameter in distiller.student.named_parameters():
        assert parameter.grad is None or parameter.grad.abs().max() < 1e-6, name


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cross_entropy_is_the_models_own(family, side):
    """But for the first token after padding, which the models' own lets the padding predict."""
    teacher, student = causal_lm(family), causal_lm(family)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    batch = lm_batch(side)
    padding = batch["attention_mask"] == 0
    shown = batch["labels"].clone()
    shown[:, 1:].masked_fill_(padding[:, :-1], -100)
    own = student(**batch | {"labels": shown}).loss
    distiller = Distiller(teacher, student, output=LinearKLLoss(kl_weight=0.5, ce_weight=1.0))
    output = distiller(**batch)
    torch.testing.assert_close(output.logs["task"], own.detach())
    assert output.logits is None
    own_grads = torch.autograd.grad(own, list(student.parameters()), allow_unused=True)
    distiller = Distiller(teacher, student, output=LinearKLLoss(kl_weight=0.0, ce_weight=1.0))
    loss = distiller(**batch).loss
    grads = torch.autograd.grad(loss, list(student.parameters()), allow_unused=True)
    for got, want in zip(grads, own_grads, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_what_padding_predicts_counts_nowhere():
    teacher, student = causal_lm("llama"), causal_lm("llama")
    with torch.no_grad():
        student.lm_head.weight.add_(torch.randn_like(student.lm_head.weight))
    batch = lm_batch("left")
    padding = batch["attention_mask"] == 0
    assert padding.any()
    for loss, options in (
        (LinearKLLoss(ce_weight=0.5), {}),
        (TopKKLLoss(ce_weight=0.5, ghost=True), {"top_k": 7}),
    ):
        distiller = Distiller(teacher, student, output=loss, **options)
        losses = []
        for token in (0, 7, 50):
            batch["input_ids"].masked_fill_(padding, token)
            losses.append(distiller(**batch).loss.detach())
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
        torch.testing.assert_close(losses[0], losses[2], rtol=1e-6, atol=0)


def test_padded_vocabularies():
    """As two sizes of one model have them: one tokenizer, heads padded to other multiples."""
    teacher, student = causal_lm("llama", vocab_size=64), causal_lm("llama")
    for loss in (LinearKLLoss(), TopKKLLoss()):
        with pytest.raises(ValueError, match=r"equal size: got 60 .student. and 64"):
            Distiller(teacher, student, output=loss)
    batch = lm_batch()
    with torch.no_grad():
        teacher.lm_head.weight[60:] *= 100  # nothing of the padding may be seen
    config = DistillConfig(alpha=1.0, beta=0.0, delta=0.0, task_weight=0.0)
    dense = Distiller(teacher, student, output=LinearKLLoss(vocab="prefix"))(**batch).loss
    entries = Distiller(teacher, student, output=TopKKLLoss(vocab="prefix"), top_k=60)
    torch.testing.assert_close(entries(**batch).loss, dense)
    losses = build_losses(config, teacher, student, vocab="prefix")
    torch.testing.assert_close(
        Distiller.from_config(teacher, student, config, losses)(**batch).loss, dense
    )


def test_students_with_adapters():
    teacher, student = causal_lm("llama"), causal_lm("qwen3")
    want = Distiller(teacher, student, output=LinearKLLoss())(**lm_batch()).loss
    got = Distiller(teacher, Adapted(student), output=LinearKLLoss())(**lm_batch()).loss
    torch.testing.assert_close(got, want)


def test_losses_that_a_missing_head_would_drop_are_refused():
    student = causal_lm("llama")
    student.config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits of the student must be False"):
        Distiller(causal_lm("llama"), student, output=LinearKLLoss())


def test_a_regression_has_no_distribution_of_outputs():
    teacher, student = (tiny_model("bert", labels=1, seed=seed) for seed in (0, 1))
    with pytest.raises(
        ValueError, match=r"alpha must be 0 for a regression or several labels: got 0\.5"
    ):
        Distiller.from_config(teacher, student, DistillConfig(alpha=0.5))
    distiller = Distiller(teacher, student, output=LogitKLLoss())
    with pytest.raises(ValueError, match="at least 2 classes: got 1"):
        distiller(**tiny_batch(3, 5))


@pytest.mark.parametrize("with_labels", [True, False])
def test_kl_is_that_of_the_models_logits(with_labels):
    teacher, student = causal_lm("llama"), causal_lm("llama")
    with torch.no_grad():
        student.lm_head.weight.add_(torch.randn_like(student.lm_head.weight))
    batch = lm_batch()
    mask = batch["attention_mask"]
    labels = batch.pop("labels")
    ours, theirs = student(**batch).logits[:, :-1], teacher(**batch).logits[:, :-1]
    rows = F.kl_div(ours.log_softmax(-1), theirs.softmax(-1), reduction="none").sum(-1)
    want = rows[mask[:, 1:].bool()].mean()
    distiller = Distiller(teacher, student, output=LinearKLLoss())
    got = distiller(**batch, **({"labels": labels} if with_labels else {}))
    torch.testing.assert_close(got.loss, want)
    torch.testing.assert_close(got.logs["soft"], want.detach())


def test_all_four_terms_at_once():
    teacher, student = causal_lm("llama"), causal_lm("llama")
    config = DistillConfig(alpha=0.7, beta=0.3, gamma=0.2, delta=0.1, temperature=2.0)
    distiller = Distiller.from_config(teacher, student, config)
    assert isinstance(distiller.output, LinearKLLoss)
    output = distiller(**lm_batch())
    terms = ["soft", "task", "cosine", "euclidean", "attention"]
    assert {*terms, *(f"weighted_{term}" for term in terms)} <= output.logs.keys()
    total = sum(output.logs[f"weighted_{term}"] for term in terms)
    torch.testing.assert_close(output.loss.detach(), total)
    output.loss.backward()


def test_classifiers_compare_their_logits():
    teacher, student = (tiny_model("bert", labels=3, seed=seed) for seed in (0, 1))
    batch = tiny_batch(4, labels=3)
    distiller = Distiller.from_config(
        teacher, student, DistillConfig(alpha=2.0, beta=0.0, delta=0.0, temperature=3.0)
    )
    assert isinstance(distiller.output, LogitKLLoss)
    assert distiller.pairs == []
    output = distiller(**batch)
    labels = batch.pop("labels")
    ours, theirs = student(**batch).logits, teacher(**batch).logits
    kl = F.kl_div((ours / 3).log_softmax(-1), (theirs / 3).softmax(-1), reduction="batchmean")
    torch.testing.assert_close(output.loss, 18 * kl + F.cross_entropy(ours, labels))


def test_explicit_losses_together():
    teacher, student = causal_lm("gemma2"), causal_lm("gemma2")
    distiller = Distiller(
        teacher,
        student,
        mapping=[(1, 1), (2, 2)],
        feature=FeatureAlignmentLoss(16, 16, 2),
        attention=AttentionKLLoss(2),
        output=LinearKLLoss(ce_weight=1.0),
    )
    distiller(**lm_batch()).loss.backward()
    assert student.model.embed_tokens.weight.grad is not None


def test_next_tokens_are_counted_as_the_loss_does():
    distiller = Distiller(
        causal_lm("llama"), causal_lm("qwen3"), output=LinearKLLoss(ce_weight=1.0)
    )
    batch, found = lm_batch("left"), []
    batch["labels"][0, 3:5] = -100
    distiller.output.register_forward_hook(lambda _, __, result: found.append(result.tokens))
    distiller(**batch)
    counts = distiller.counts(**batch)
    assert counts["next_tokens"] == found[0]
    # The model's own loss knows no mask, and the padding has no label.
    assert counts["labels"] == (batch["labels"][:, 1:] != -100).sum()
    del batch["labels"]
    distiller.output.ce_weight = 0.0
    distiller(**batch)
    assert distiller.counts(**batch)["next_tokens"] == found[1] > found[0]


def test_tied_weights_have_one_name_in_what_is_saved():
    distiller, other = (
        Distiller(causal_lm("llama"), causal_lm("qwen3"), output=LinearKLLoss()) for _ in range(2)
    )
    state = distiller.state_dict()
    assert "student.model.embed_tokens.weight" in state
    assert "student.lm_head.weight" not in state
    with torch.no_grad():
        other.student.lm_head.weight.zero_()
    other.load_state_dict(state)
    assert other.student.lm_head.weight is other.student.model.embed_tokens.weight
    assert torch.equal(other.student.lm_head.weight, distiller.student.lm_head.weight)


def test_an_output_loss_needs_a_teacher():
    with pytest.raises(ValueError, match="output must come with a teacher"):
        Distiller(None, causal_lm("llama"), output=LinearKLLoss())
