"""The classifier that reads the mean of its tokens: what it computes, and how it is kept."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from fakd import models
from fakd.architectures import find_blocks
from fakd.config import DataConfig, RunConfig, StudentConfig
from fakd.mean_classifier import MeanClassifier, has_mean_head
from tests.support.models import tiny_batch, tiny_model

LABELS = ["bad", "fair", "good"]


def make(**options) -> MeanClassifier:
    encoder = tiny_model(width=64, num_attention_heads=8, **options)
    encoder.config.num_labels = 3
    return MeanClassifier(encoder).eval()


def settings(teacher: Path | None, **student) -> RunConfig:
    teacher = None if teacher is None else str(teacher)
    data = DataConfig("r8")
    return RunConfig("classification", teacher, StudentConfig(**student), data, Path("."), steps=1)


def test_mean_over_tokens_leaves_padding_out():
    model, batch = make(), tiny_batch()
    with torch.no_grad():
        logits = model(**batch).logits
        hidden = model.encoder(**batch).last_hidden_state
        for row, length in enumerate(batch["attention_mask"].sum(1)):
            expected = model.head(hidden[row, :length].mean(0))
            torch.testing.assert_close(logits[row], expected)


def test_loss_leaves_hidden_labels_out():
    model, batch = make(), tiny_batch(labels=3)
    first = {name: tensor[:1] for name, tensor in batch.items()}
    batch["labels"][1:] = -100
    torch.testing.assert_close(model(**batch).loss, model(**first).loss)


def test_regression():
    encoder = tiny_model()
    encoder.config.num_labels, encoder.config.problem_type = 1, "regression"
    model, batch = MeanClassifier(encoder).eval(), tiny_batch()
    numbers = torch.linspace(0, 1, len(batch["input_ids"]))
    output = model(**batch, labels=numbers)
    torch.testing.assert_close(output.loss, (output.logits[:, 0] - numbers).square().mean())


def test_blocks_are_found():
    assert find_blocks(make()).path == "encoder.encoder.layer"


def test_a_saved_one_is_a_teacher_again_and_its_encoder_any_model(tmp_path):
    encoder = save_encoder(tmp_path / "encoder")
    student = models.make_student(settings(None, path=str(encoder), pooling="mean"), None, LABELS)
    assert student.config.id2label == dict(enumerate(LABELS))
    assert not has_mean_head(encoder)
    folder = tmp_path / "student"
    student.save_pretrained(folder, state_dict=student.state_dict())
    teacher = models.load_teacher(settings(folder, layers=2), LABELS)
    assert_same(teacher, student)
    # Without asking for a pooling too.
    assert_same(models.make_student(settings(None, path=str(folder)), None, LABELS), student)
    plain, found = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"]
    assert_same(plain, student.encoder)


def test_other_classes_get_a_fresh_head(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    other = models.make_student(settings(None, path=str(tmp_path)), None, ["no", "yes"])
    assert other.head.out_features == 2
    assert_same(other.encoder, model.encoder)
    with pytest.raises(ValueError, match="head of 2 outputs"):
        models.load_teacher(settings(tmp_path, layers=2), ["no", "yes"])


def test_cut_students_have_its_head_where_it_fits():
    teacher = make(layers=4)
    same = models.make_student(settings(Path("t"), layers=2), teacher, LABELS)
    assert torch.equal(same.head.weight, teacher.head.weight)
    assert len(find_blocks(same)) == 2
    narrow = models.make_student(settings(Path("t"), layers=2, width=32), teacher, LABELS)
    assert narrow.head.weight.shape == (3, 32)


@pytest.mark.parametrize(
    ("student", "match"),
    [
        ({"path": "x", "pooling": "max"}, "student.pooling must be one of 'model', 'mean'"),
        ({"layers": 2, "pooling": "mean"}, "student.pooling must be left out with layers"),
    ],
)
def test_poolings_that_cannot_be(student, match):
    with pytest.raises(ValueError, match=match):
        StudentConfig(**student)


def test_language_models_have_no_mean():
    student = StudentConfig(path="x", pooling="mean")
    with pytest.raises(ValueError, match=r"student\.pooling must be 'model' for causal_lm"):
        RunConfig("causal_lm", None, student, DataConfig("sotu"), Path("."), steps=1)


def save_encoder(folder: Path) -> Path:
    tiny_model(width=64, num_attention_heads=8).save_pretrained(folder)
    return folder


def assert_same(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
