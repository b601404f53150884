"""Scores of checkpoints, and the student that was best on the way."""

import json

import pytest
import torch
from safetensors.torch import load_file

import fakd.run as module
from fakd.distribute import join
from fakd.train_log import TrainLog
from tests.support.runs import invoke, make_assets, settings


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield make_assets(tmp_path_factory.mktemp("assets"))


def test_scores_on_the_way_and_the_best_student(assets, tmp_path):
    """Steps that are far too long spoil the student, and what it was before is kept."""
    output = tmp_path / "spoilt"
    result = invoke("train", *settings(assets, output), "-s", "train.learning_rate=30")
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (output / "scores.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    results = json.loads((output / "results.json").read_text())
    assert lines[-1] == {"step": 8, **results["student"]}
    best = max(lines, key=lambda line: (line["accuracy"], line["step"]))
    assert results["best_step"] == best["step"]
    assert results["best"] == {name: value for name, value in best.items() if name != "step"}
    for line in lines[:-1]:
        assert f"step {line['step']}: accuracy {line['accuracy']:.4f}" in result.output
    assert (output / "student-best").exists() == (best["step"] < 8)
    again = invoke("train", *settings(assets, output), "-s", "train.learning_rate=30")
    assert "all 8 steps are done: nothing to train" in again.output


def test_the_best_student_is_a_folder_of_its_own(assets, tmp_path):
    output = tmp_path / "better-before"
    scores = iter([0.1, 0.9, 0.8, 0.7, 0.6])  # of the start, and of four checkpoints
    whole = module._evaluate

    def evaluate(model, parts, accelerator):
        found = whole(model, parts, accelerator)
        if model is not parts.teacher:
            found.scores["accuracy"] = next(scores)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_evaluate", evaluate)
        result = invoke("train", *settings(assets, output))
    assert result.exit_code == 0, result.output
    assert "the best was step 2, accuracy 0.9000" in result.output.replace("\n", " ")
    best = load_file(output / "student-best" / "model.safetensors")
    kept = load_file(output / "checkpoints" / "step-00000002" / "model.safetensors")
    assert best.keys() == load_file(output / "student" / "model.safetensors").keys()
    for name, tensor in best.items():
        assert torch.equal(tensor, kept[f"student.{name}"])


def test_without_a_console_scores_are_written_and_not_said(tmp_path, capsys):
    log = TrainLog(join(), 1, 4, 0, tmp_path / "log.jsonl", None, "quiet")
    with log:
        log.add_scores(2, {"accuracy": 0.5})
    assert json.loads((tmp_path / "scores.jsonl").read_text()) == {"step": 2, "accuracy": 0.5}
    assert capsys.readouterr().out == ""
