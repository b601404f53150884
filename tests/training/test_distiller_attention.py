"""`Distiller` with the loss of attention: beside hidden states, alone, and from a config."""

import pytest
import torch

from fakd import (
    AttentionKLLoss,
    DistillConfig,
    Distiller,
    FeatureAlignmentLoss,
    RelationKLLoss,
    TrainConfig,
    capture_attention,
    distiller,
)
from fakd.train import train
from tests.support.models import tiny_batch, tiny_model


def make(**options) -> Distiller:
    teacher = tiny_model(layers=4, width=32, num_attention_heads=4, labels=3, seed=1)
    student = tiny_model(layers=2, width=16, labels=3, seed=2)
    torch.manual_seed(3)
    return Distiller(teacher, student, **options)


def by_hand(model: Distiller, loss, batch) -> torch.Tensor:
    """The attention term, captured apart."""
    ours_wanted, theirs_wanted = zip(*model.attention_pairs, strict=True)
    with torch.no_grad():
        with capture_attention(model.student, ours_wanted, values=True) as ours:
            model.student(**batch)
        with capture_attention(model.teacher, theirs_wanted, values=True) as theirs:
            model.teacher(**batch)
        pairs = model.attention_pairs
        return loss([ours[s] for s, _ in pairs], [theirs[t] for _, t in pairs]).loss


def test_loss_is_the_sum_of_its_parts():
    attention = AttentionKLLoss(2, heads="mean", weight=0.5)
    model, batch = make(attention=attention, feature=FeatureAlignmentLoss(16, 32, 2)).eval(), None
    batch = tiny_batch(labels=3)
    output = model(**batch)
    weighted = {n: v for n, v in output.logs.items() if n.startswith("weighted_")}
    assert sorted(weighted) == [
        f"weighted_{name}" for name in ("attention", "cosine", "euclidean", "task")
    ]
    torch.testing.assert_close(sum(weighted.values()), output.loss.detach())
    torch.testing.assert_close(weighted["weighted_attention"], by_hand(model, attention, batch))
    torch.testing.assert_close(weighted["weighted_attention"], 0.5 * output.logs["attention"])
    assert not any(value.requires_grad for value in output.logs.values())


def test_attention_alone_has_no_loss_of_hidden_states():
    model = make(attention=AttentionKLLoss(2, heads="auto"))
    assert model.feature is None
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"student"}
    output = model(**tiny_batch())
    assert sorted(output.logs) == ["attention", "weighted_attention"]
    output.loss.backward()
    layer = model.student.bert.encoder.layer[1]
    assert layer.attention.self.key.weight.grad.abs().sum() > 0
    assert layer.attention.self.value.weight.grad is None
    assert all(parameter.grad is None for parameter in model.teacher.parameters())


def test_relations():
    loss = RelationKLLoss(2, 4)
    model, batch = make(attention=loss).eval(), tiny_batch()
    torch.testing.assert_close(model(**batch).loss.detach(), by_hand(model, loss, batch))
    assert "relation_v" in model(**batch).logs


def test_what_is_off_is_not_captured(monkeypatch):
    calls = []

    def watch(name: str) -> None:
        original = getattr(distiller, name)

        def watched(*arguments, **options):
            calls.append(name)
            return original(*arguments, **options)

        monkeypatch.setattr(distiller, name, watched)

    watch("capture_hidden_states")
    watch("capture_attention")
    models = make().teacher, make().student
    for config, expected in (
        (DistillConfig(gamma=0.1), {"capture_hidden_states", "capture_attention"}),
        (DistillConfig(), {"capture_hidden_states"}),
        (DistillConfig(beta=0, delta=0, gamma=0.1), {"capture_attention"}),
        (DistillConfig(beta=0, delta=0), set()),
    ):
        calls.clear()
        Distiller.from_config(*models, config)(**tiny_batch(labels=3))
        assert set(calls) == expected


def test_from_config():
    teacher, student = make().teacher, make().student
    model = Distiller.from_config(teacher, student, DistillConfig(mapping="all", gamma=0.25))
    assert model.pairs == [(0, 0), (1, 2), (2, 4)]
    assert model.attention_pairs == [(1, 2), (2, 4)]
    assert (model.attention.weight, model.attention.heads) == (0.25, "auto")
    config = DistillConfig(gamma=2.0, attention_mapping="last", heads=[3, 1])
    model = Distiller.from_config(teacher, student, config)
    assert model.attention_pairs == [(2, 4)]
    assert model.attention.heads == [3, 1]
    assert model(**tiny_batch()).loss.isfinite()
    assert Distiller.from_config(teacher, student, DistillConfig()).attention is None
    with pytest.raises(ValueError, match="gamma must be a finite number >= 0: got -1"):
        Distiller.from_config(teacher, student, DistillConfig(gamma=-1.0))


def test_map_of_attention():
    loss = AttentionKLLoss(1, heads="mean")
    assert make(attention=loss, mapping=[(0, 0), (2, 3)]).attention_pairs == [(2, 3)]
    assert make(attention=loss, attention_mapping=[(1, 4)]).attention_pairs == [(1, 4)]
    preset = make(attention=AttentionKLLoss(2, heads="mean"), attention_mapping="all")
    assert preset.attention_pairs == [(1, 2), (2, 4)]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"mapping": [(0, 0)]}, r"must name layers from 1: got \[\(0, 0\)\]; the embeddings"),
        ({"attention_mapping": [(0, 0), (2, 4)]}, r"from 1: got \[\(0, 0\), \(2, 4\)\]"),
        ({"attention_mapping": [(3, 4)]}, "a student layer from 0 .* to 2: got 3"),
        (
            {"attention_mapping": "last"},
            r"attention must be built for the 1 pairs .* got one for 2",
        ),
    ],
)
def test_impossible_maps(options, match):
    with pytest.raises(ValueError, match=match):
        make(attention=AttentionKLLoss(2, heads="mean"), **options)


def test_attention_needs_a_teacher():
    with pytest.raises(ValueError, match="attention must come with a teacher: got teacher=None"):
        Distiller(None, tiny_model(), attention=AttentionKLLoss(1))


def test_unequal_heads_say_what_to_do():
    with pytest.raises(ValueError, match="use 'mean', or a list"):
        make(attention=AttentionKLLoss(2))(**tiny_batch())


def test_models_without_the_interface_are_refused():
    model = Distiller(tiny_model("mpnet"), tiny_model(layers=2), attention=AttentionKLLoss(2))
    with pytest.raises(RuntimeError, match="MPNetLayer must compute attention through"):
        model(**tiny_batch())


def test_decoders_of_two_families():
    teacher = tiny_model("qwen3", width=24, num_attention_heads=3)
    student = tiny_model("gpt2", layers=2)
    model = Distiller(
        teacher, student, mapping="last_2", attention=AttentionKLLoss(2, heads="auto")
    )
    for padding in ("left", "right"):
        assert model(**tiny_batch(padding=padding)).loss.isfinite()


def test_every_term_falls():
    model = make(
        attention=AttentionKLLoss(2, heads="mean", weight=10.0),
        feature=FeatureAlignmentLoss(16, 32, 2),
    )
    for settings in (model.student.config, model.teacher.config):
        settings.attention_probs_dropout_prob = 0.0
    # Wide maps, so that there is something to learn.
    with torch.no_grad():
        for layer in model.teacher.bert.encoder.layer:
            layer.attention.self.query.weight.mul_(20)
    batches = [tiny_batch(8, labels=3, seed=index % 4) for index in range(80)]
    log = train(model, batches, TrainConfig(learning_rate=1e-2, log_every=10))
    for name in ("loss", "task", "cosine", "euclidean", "attention"):
        assert log[-1][name] < 0.8 * log[0][name], name
