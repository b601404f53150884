"""`Distiller` as the model of a Hugging Face `Trainer`: it trains, saves, goes on, and scores."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from fakd import DistillConfig, Distiller
from tests.support.models import tiny_batch, tiny_model
from tests.training.test_lm_head import causal_lm

CONFIG = DistillConfig(alpha=0.5, gamma=0.2, heads="mean")
# What loads the student alone. The heads of qwen3 are tied to its embeddings here.
AUTO_MODELS = {
    "bert": AutoModelForSequenceClassification,
    "llama": AutoModelForCausalLM,
    "qwen3": AutoModelForCausalLM,
}


def make(family: str) -> Distiller:
    if family == "bert":
        teacher = tiny_model(layers=4, width=32, labels=3, seed=1)
        student = tiny_model(layers=2, labels=3, seed=2)
    else:
        teacher, student = causal_lm("llama"), causal_lm(family)
        with torch.no_grad():
            student.get_input_embeddings().weight.mul_(0.5)
    torch.manual_seed(3)
    return Distiller.from_config(teacher, student, CONFIG)


def rows(family: str) -> list[dict]:
    batch = tiny_batch(8, 11, labels=3)
    if family != "bert":
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return [{key: value[row] for key, value in batch.items()} for row in range(8)]


def trainer(family: str, distiller: Distiller, folder, **options) -> Trainer:
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1} | options
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        # The Trainer looks for columns in the signature, which leaves them to the models.
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        dataloader_pin_memory=False,
        **options,
    )
    return Trainer(distiller, arguments, train_dataset=rows(family), eval_dataset=rows(family))


@pytest.mark.parametrize("family", AUTO_MODELS)
def test_it_trains_and_the_student_is_a_plain_checkpoint(family, tmp_path):
    distiller = make(family)
    before = copy.deepcopy(distiller.state_dict())
    run = trainer(family, distiller, tmp_path)
    run.train()
    assert any(not torch.equal(v, before[k]) for k, v in distiller.state_dict().items())
    losses = [line["loss"] for line in run.state.log_history if "loss" in line]
    assert len(losses) == 3
    assert max(losses) < 20
    assert run.evaluate()["eval_loss"] < 20

    distiller.student.save_pretrained(tmp_path / "student")
    student = AUTO_MODELS[family].from_pretrained(tmp_path / "student")
    batch = {k: v for k, v in tiny_batch(3).items() if k != "labels"}
    with torch.no_grad():
        expected = distiller.student.eval()(**batch).logits
        assert torch.equal(student(**batch).logits, expected)


@pytest.mark.parametrize("family", AUTO_MODELS)
def test_its_checkpoints_hold_the_student_and_the_projections_and_go_on(family, tmp_path):
    whole = make(family)
    trainer(family, whole, tmp_path).train()
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert {name.split(".")[0] for name in saved} <= {"student", "feature"}
    assert saved.keys() == whole.state_dict().keys()
    resumed = make(family)
    run = trainer(family, resumed, tmp_path)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_gradient_checkpointing_is_the_students(tmp_path):
    plain, saving = make("bert"), make("bert")
    trainer("bert", plain, tmp_path, save_strategy="no").train()
    trainer("bert", saving, tmp_path, save_strategy="no", gradient_checkpointing=True).train()
    for model, is_saving in ((saving.student, True), (saving.teacher, False)):
        flags = [getattr(part, "gradient_checkpointing", False) for part in model.modules()]
        assert any(flags) == is_saving
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(saving.state_dict()[name], tensor)


def test_accumulation_and_predictions(tmp_path):
    run = trainer("bert", make("bert"), tmp_path, save_strategy="no", gradient_accumulation_steps=2)
    assert not run.model_accepts_loss_kwargs
    run.train()
    logits, logs = run.predict(rows("bert")).predictions
    assert logits.shape == (8, 3)
    assert "weighted_cosine" in logs
    run.preprocess_logits_for_metrics = lambda output, labels: output[0]
    assert (run.predict(rows("bert")).predictions == logits).all()
