"""`Distiller`: one module for any loop; the teacher is frozen, and stays out of what is saved."""

import copy

import pytest
import torch
from transformers import AutoModelForQuestionAnswering

from fakd import DistillConfig, Distiller, FeatureAlignmentLoss, capture_hidden_states
from tests.support.models import tiny_batch, tiny_model


def make(**options) -> Distiller:
    teacher = tiny_model(layers=4, width=32, labels=3, seed=1)
    student = tiny_model(layers=2, width=16, labels=3, seed=2)
    torch.manual_seed(3)
    return Distiller(teacher, student, **options)


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def test_loss_is_the_sum_of_its_parts():
    distiller, batch = make(mapping=[(1, 2), (2, 4)], task_weight=0.5).eval(), tiny_batch(labels=3)
    output = distiller(**batch)
    with torch.no_grad():
        plain = distiller.student(**batch, output_hidden_states=True)
        theirs = distiller.teacher(**batch, output_hidden_states=True).hidden_states
        features = distiller.feature(
            [plain.hidden_states[1], plain.hidden_states[2]],
            [theirs[2], theirs[4]],
            batch["attention_mask"].bool(),
        )
    torch.testing.assert_close(output.loss.detach(), 0.5 * plain.loss + features.loss)
    assert torch.equal(output.logits, plain.logits)
    logs = output.logs
    assert sorted(logs) == sorted(
        f"{prefix}{name}"
        for prefix in ("", "weighted_")
        for name in ("task", "cosine", "euclidean")
    )
    torch.testing.assert_close(logs["weighted_task"], 0.5 * logs["task"])
    weighted = sum(value for name, value in logs.items() if name.startswith("weighted_"))
    torch.testing.assert_close(weighted, output.loss.detach())
    assert not any(value.requires_grad for value in logs.values())


def test_padding_counts_nowhere():
    distiller, batch = make().eval(), tiny_batch(labels=3)
    changed = copy.deepcopy(batch)
    changed["input_ids"][batch["attention_mask"] == 0] = 7
    torch.testing.assert_close(distiller(**changed).logs, distiller(**batch).logs)


def test_no_labels_no_task_term():
    output = make()(**tiny_batch())
    assert sorted(output.logs) == ["cosine", "euclidean", "weighted_cosine", "weighted_euclidean"]


def test_labels_alone():
    student = tiny_model(labels=3)
    distiller, batch = Distiller(None, student), tiny_batch(labels=3)
    output = distiller.eval()(**batch)
    assert torch.equal(output.loss, student(**batch).loss)
    assert sorted(output.logs) == ["task", "weighted_task"]


def test_student_equal_to_teacher_has_no_loss():
    teacher = tiny_model()
    student = copy.deepcopy(teacher)
    distiller = Distiller(teacher, student, mapping="all").eval()
    output = distiller(**tiny_batch())
    assert float(output.loss.detach()) == pytest.approx(0, abs=1e-6)


def test_student_converges_to_its_own_teacher():
    teacher = without_dropout(tiny_model(seed=1))
    student = without_dropout(tiny_model(seed=2))
    distiller = Distiller(teacher, student).train()
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-2, weight_decay=0.0)
    values = []
    for step in range(150):
        optimizer.zero_grad()
        loss = distiller(**tiny_batch(8, seed=step % 4)).loss
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
    assert values[-1] < 0.1 * values[0]


def test_teacher_is_frozen_and_untouched():
    distiller = make()
    before = copy.deepcopy(distiller.teacher.state_dict())
    buffers = {name for name, _ in distiller.named_buffers()}
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=0.1)
    distiller.train()
    assert distiller.student.training
    assert not any(module.training for module in distiller.teacher.modules())
    for _ in range(3):
        distiller(**tiny_batch(labels=3)).loss.backward()
        optimizer.step()
    assert all(parameter.grad is None for parameter in distiller.teacher.parameters())
    for name, tensor in distiller.teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(name.startswith("student.") for name in buffers)


def test_teacher_is_neither_saved_nor_optimised():
    distiller = make()
    prefixes = {name.split(".")[0] for name in distiller.state_dict()}
    assert prefixes == {"student", "feature"}
    assert {name.split(".")[0] for name, _ in distiller.named_parameters()} == prefixes
    teachers = {id(parameter) for parameter in distiller.teacher.parameters()}
    assert not teachers & {id(parameter) for parameter in distiller.parameters()}


def test_teacher_follows_to():
    distiller = make().to(torch.float64)
    assert distiller.teacher.dtype == distiller.student.dtype == torch.float64
    assert distiller(**tiny_batch()).loss.dtype == torch.float64


def test_teacher_runs_without_gradients():
    distiller, seen = make(), []
    distiller.teacher.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    assert distiller(**tiny_batch()).loss.requires_grad
    assert seen == [False]


def test_every_projection_and_block_learns():
    distiller = make()
    distiller(**tiny_batch(labels=3)).loss.backward()
    without = {n for n, p in distiller.named_parameters() if p.grad is None}
    assert without == set()


def test_models_receive_what_their_forward_names():
    teacher, student = tiny_model("bert", seed=1), tiny_model("distilbert", layers=2)
    batch = tiny_batch()
    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    assert Distiller(teacher, student)(**batch).loss.isfinite()
    with pytest.raises(TypeError, match="got 'lables'; drop it"):
        Distiller(teacher, student)(**batch, lables=torch.zeros(3))


def test_decoder_from_another_family():
    teacher, student = tiny_model("qwen3", width=24), tiny_model("gpt2", layers=2)
    output = Distiller(teacher, student, mapping="last_2")(**tiny_batch())
    output.loss.backward()
    assert output.loss.isfinite()


def test_from_config():
    teacher, student = tiny_model(width=32), tiny_model(layers=2)
    config = DistillConfig(mapping="last", beta=0.25, delta=2.0, projection="shared", init="xavier")
    distiller = Distiller.from_config(teacher, student, config)
    assert distiller.pairs == [(2, 4)]
    assert (distiller.feature.cosine_weight, distiller.feature.euclidean_weight) == (0.25, 2.0)
    assert (distiller.feature.projection, distiller.feature.init) == ("shared", "xavier")
    labels_only = Distiller.from_config(teacher, student, DistillConfig(beta=0, delta=0))
    assert labels_only.feature is None


def test_nothing_stays_on_the_models():
    distiller = make()
    distiller(**tiny_batch())
    for model in (distiller.teacher, distiller.student):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with capture_hidden_states(distiller.student, [1]) as states:
        distiller(**tiny_batch())
    assert list(states) == [1]


def test_counts():
    batch = tiny_batch(4, 7, labels=3)  # 7, 6, 5 and 4 tokens
    batch["labels"][1] = -100
    found = {name: count.item() for name, count in make().counts(**batch).items()}
    tokens = {"tokens": 22, "decoder_tokens": 22}
    assert found == {"rows": 4, **tokens, "next_tokens": 18, "labels": 3}
    del batch["labels"], batch["attention_mask"]
    found = {name: count.item() for name, count in make().counts(**batch).items()}
    tokens = {"tokens": 28, "decoder_tokens": 28}
    assert found == {"rows": 4, **tokens, "next_tokens": 24, "labels": 0}
    scores = torch.tensor([0.5, -100.0])
    assert make().counts(scores, input_ids=batch["input_ids"][:2])["labels"] == 2
    # Images: rows are all that is known of them.
    assert make().counts(pixel_values=torch.ones(2, 3, 8, 8))["tokens"] == 2
    with pytest.raises(ValueError, match=r"must hold tensors to be counted: got \[\]"):
        make().counts()


def test_parts_add_up_to_the_whole():
    distiller, batch = make().eval(), tiny_batch(6, labels=3)
    batch["labels"][:2] = -100
    parts = [{k: v[i : i + 2] for k, v in batch.items()} for i in (0, 2, 4)]
    counts = [distiller.counts(**part) for part in parts]
    normalizers = {name: sum(count[name] for count in counts) for name in counts[0]}
    whole, outputs = distiller(**batch), [distiller(**p, normalizers=normalizers) for p in parts]
    assert outputs[0].logs["task"] == 0
    assert not outputs[0].logits.requires_grad
    torch.testing.assert_close(sum(output.loss for output in outputs), whole.loss)
    for name, value in whole.logs.items():
        torch.testing.assert_close(sum(output.logs[name] for output in outputs), value)
    with pytest.raises(ValueError, match=r"normalizers must hold .*: got no labels; pass the"):
        distiller(**batch, normalizers={k: v for k, v in normalizers.items() if k != "labels"})


def test_own_counts_change_nothing():
    distiller, batch = make().eval(), tiny_batch(4, labels=3)
    plain, same = distiller(**batch), distiller(**batch, normalizers=distiller.counts(**batch))
    assert torch.equal(plain.loss, same.loss)
    parameters = list(distiller.parameters())
    for got, want in zip(
        *(torch.autograd.grad(output.loss, parameters) for output in (same, plain)), strict=True
    ):
        assert torch.equal(got, want)


def test_labels_by_other_names_count_by_texts():
    config = tiny_model("bert").config
    teacher, student = (AutoModelForQuestionAnswering.from_config(config) for _ in range(2))
    distiller, batch = Distiller(teacher, student).eval(), tiny_batch(4)
    batch |= {"start_positions": torch.tensor([1, 2, 0, 1]), "end_positions": torch.tensor([2] * 4)}
    plain, same = distiller(**batch), distiller(**batch, normalizers=distiller.counts(**batch))
    assert plain.logs["task"] > 0
    torch.testing.assert_close(same.loss, plain.loss)


def test_student_alone_is_a_plain_checkpoint(tmp_path):
    distiller = make()
    distiller.student.save_pretrained(tmp_path)
    reloaded = type(distiller.student).from_pretrained(tmp_path)
    assert torch.equal(reloaded(**tiny_batch()).logits, distiller.student(**tiny_batch()).logits)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"mapping": [(1, 5)]}, "a teacher layer from 0 .* to 4: got 5"),
        ({"mapping": "unifrom"}, "did you mean 'uniform'"),
        ({"feature": FeatureAlignmentLoss(16, 32, 3)}, "built for the 2 pairs .* got one for 3"),
        ({"task_weight": -1.0}, "task_weight must be a finite number >= 0: got -1"),
        ({"teacher_path": "bert.layers"}, "got 'bert.layers', no such module"),
    ],
)
def test_impossible_settings(options, match):
    with pytest.raises(ValueError, match=match):
        make(**options)


def test_impossible_models():
    model = tiny_model()
    with pytest.raises(ValueError, match="must be two models: got the same one twice"):
        Distiller(model, model)
    with pytest.raises(ValueError, match="feature must come with a teacher"):
        Distiller(None, model, feature=FeatureAlignmentLoss(16, 16))


def test_impossible_batches():
    with pytest.raises(ValueError, match="batch must hold labels where there is no teacher"):
        Distiller(None, tiny_model(labels=3))(**tiny_batch())
    with pytest.raises(ValueError, match="a loss from them: got BertModel; give it a head"):
        Distiller(tiny_model(seed=1), tiny_model())(**tiny_batch(labels=3))
    batch = tiny_batch()
    with pytest.raises(ValueError, match=r"attention_mask must be \[B, T\]: got \[3, 1, 7, 7\]"):
        make()(
            input_ids=batch["input_ids"], attention_mask=torch.ones(3, 1, 7, 7, dtype=torch.bool)
        )


def test_unequal_token_counts():
    distiller = make()
    distiller.teacher.register_forward_pre_hook(
        lambda _, args, kwargs: (
            args,
            {k: v[:, :-1] if torch.is_tensor(v) else v for k, v in kwargs.items()},
        ),
        with_kwargs=True,
    )
    with pytest.raises(ValueError, match=r"same tokens: got \[3, 6\] and \[3, 7\]; use one token"):
        distiller(**tiny_batch())
