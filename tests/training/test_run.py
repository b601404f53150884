"""Whole trainings from settings: real files, real processes, killed and gone on with."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.support.runs import ROOT, invoke, make_assets, settings


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    return make_assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def finished(assets, tmp_path_factory):
    """Output folders of both tasks, trained without a stop."""
    folders = {}
    for task in ("classification", "causal_lm"):
        folders[task] = tmp_path_factory.mktemp("runs") / task
        result = invoke("train", *settings(assets, folders[task], task))
        assert result.exit_code == 0, result.output
    return folders


def weights(folder):
    return load_file(folder / "student" / "model.safetensors")


def assert_same_weights(folder, other):
    ours, theirs = weights(folder), weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_a_run_keeps_everything(assets, finished, task):
    folder = finished[task]
    results = json.loads((folder / "results.json").read_text())
    metric = "accuracy" if task == "classification" else "perplexity"
    assert metric in results["teacher"]
    assert metric in results["student"]
    assert results["steps"] == 8
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [2, 4, 6, 8]
    terms = ("task", "soft", "cosine", "euclidean", "attention")
    assert all(f"weighted_{term}" in log[-1] and term in log[-1] for term in terms)
    assert "gamma: " in (folder / "config.yaml").read_text()
    auto = AutoModelForCausalLM if task == "causal_lm" else AutoModelForSequenceClassification
    student, found = auto.from_pretrained(folder / "student", output_loading_info=True)
    assert not found["missing_keys"]
    assert student.config.num_hidden_layers == 2
    assert AutoModel.from_pretrained(folder / "student").config.hidden_size in (8, 16)
    saved = load_file(next((folder / "checkpoints").glob("step-*")) / "model.safetensors")
    assert not any("teacher" in name for name in saved)


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_eval_gives_the_scores_of_the_training(finished, task):
    results = json.loads((finished[task] / "results.json").read_text())
    result = invoke("eval", finished[task])
    assert result.exit_code == 0, result.output
    for name, value in results["student"].items():
        text = f"{value:.2f}" if name == "perplexity" else f"{value:.4f}"
        assert f"{name} {text}" in result.output


def test_eval_scores_any_model(assets):
    flags = ["--task", "classification", "--data", assets / "rows.jsonl"]
    result = invoke("eval", assets / "encoder", *flags, "-s", "data.max_tokens=12")
    assert result.exit_code == 0, result.output
    assert "accuracy 0." in result.output
    assert "120 texts of 2 classes to score" in result.output


def test_eval_scores_a_file_whole_with_the_classes_of_the_model(assets, finished, tmp_path):
    path = tmp_path / "test.csv"
    path.write_text("text,label\nw1 w2,b\n", encoding="utf-8")
    size = ("-s", "data.max_tokens=12")
    for model in (finished["classification"], assets / "encoder"):
        task = ("--task", "classification") if model == assets / "encoder" else ()
        result = invoke("eval", model, *task, "--data", path, *size)
        assert result.exit_code == 0, result.output
        assert "1 texts of 2 classes to score" in result.output
    path.write_text("text,label\nw1 w2,b\nw3,z\n", encoding="utf-8")
    result = invoke("eval", finished["classification"], "--data", path)
    assert result.exit_code == 2
    message = " ".join(result.output.split())
    assert "label must name classes of the model ('a', 'b'): got 'z'; rename or drop" in message
    assert "teacher" not in message


def test_eval_holds_out_what_the_training_did_of_its_own_data(assets, finished):
    own = invoke("eval", finished["classification"]).output
    again = invoke("eval", finished["classification"], "--data", assets / "rows.jsonl").output
    assert again == own
    assert "held out" in own


def test_the_same_command_again_changes_nothing(assets, finished, tmp_path):
    folder = finished["classification"]
    before = weights(folder)
    result = invoke("train", *settings(assets, folder))
    assert result.exit_code == 0, result.output
    after = weights(folder)
    assert all(torch.equal(before[name], after[name]) for name in before)


# Where a process dies: before the n-th call of a function, or after half a file was written.
KILLED = """
import os, signal, sys
import torch
from pathlib import Path
from fakd import checkpoint, run
from fakd.cli import app

def die(*_arguments, **_options):
    os.kill(os.getpid(), signal.SIGKILL)

def on_call(owner, name, count):
    original, calls = getattr(owner, name), [0]
    def wrapper(*arguments, **options):
        calls[0] += 1
        if calls[0] == count:
            die()
        return original(*arguments, **options)
    setattr(owner, name, wrapper)

def half_a_file(tensors, path):
    write(tensors, path)
    if "00000004" in str(path) and "optimizer" in str(path):
        os.truncate(path, os.path.getsize(path) // 2)
        die()

write = checkpoint.save_file
point = sys.argv.pop(1)
if point == "step": on_call(torch.optim.AdamW, "step", 6)
elif point == "first step": on_call(torch.optim.AdamW, "step", 1)
elif point == "inside a save": checkpoint.save_file = half_a_file
elif point == "before the rename": on_call(checkpoint, "sync_folder", 2)
elif point == "inside the pruning": on_call(checkpoint.shutil, "rmtree", 6)
elif point == "at the end": on_call(run, "sync_folder", 1)
app(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "point"),
    [
        ("classification", "first step"),
        ("classification", "step"),
        ("classification", "before the rename"),
        ("causal_lm", "inside a save"),
        ("causal_lm", "inside the pruning"),
        ("causal_lm", "at the end"),
    ],
)
def test_killed_at_any_point_the_same_command_ends_in_the_same_weights(
    assets, finished, tmp_path, task, point
):
    arguments = settings(assets, tmp_path / "run", task)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, point, "train", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "run" / "results.json").exists()
    result = invoke("train", *arguments)
    assert result.exit_code == 0, result.output
    assert_same_weights(tmp_path / "run", finished[task])
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [2, 4, 6, 8]


def test_a_truncated_checkpoint_is_refused_by_name_and_the_run_goes_on(assets, finished, tmp_path):
    arguments = settings(assets, tmp_path / "run", "classification", "train.keep=4")
    assert invoke("train", *arguments).exit_code == 0
    last = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    os.truncate(last / "model.safetensors", 100)
    result = invoke("train", *arguments)
    assert result.exit_code == 0, result.output
    assert f"refused: checkpoint {last.name}" in result.output.replace("\n", " ")
    assert_same_weights(tmp_path / "run", finished["classification"])


def test_report_compares_runs(assets, finished, tmp_path):
    other = tmp_path / "other"
    more = "distill.beta=0.5"
    assert invoke("train", *settings(assets, other, "classification", more)).exit_code == 0
    page = tmp_path / "page.html"
    result = invoke("report", finished["classification"], other, "--output", page)
    assert result.exit_code == 0, result.output
    text = page.read_text()
    assert "distill.beta: 0.5, was 1.0" in text
    assert text.count("<svg") == 2
    assert "other against classification: " in text
    for name in ("student, classification", "student, other", "attention", "accuracy"):
        assert name in text


def test_accumulation_takes_the_same_steps(assets, finished, tmp_path):
    arguments = settings(assets, tmp_path / "run", "causal_lm", "train.accumulation=2")
    result = invoke("train", *arguments)
    assert result.exit_code == 0, result.output
    ours, theirs = weights(tmp_path / "run"), weights(finished["causal_lm"])
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4)


def test_packed_texts_are_trained_on(assets, tmp_path):
    values = ["data.layout=packed", "distill.gamma=0"]
    result = invoke("train", *settings(assets, tmp_path / "run", "causal_lm", *values))
    assert result.exit_code == 0, result.output
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["soft"] > 0


def test_a_dry_run_prints_all_settings_and_trains_nothing(assets, tmp_path):
    result = invoke("train", *settings(assets, tmp_path / "run"), "--dry")
    assert result.exit_code == 0
    assert "learning_rate: 0.01" in result.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("train.lerning_rate=1", "did you mean train.learning_rate?"),
        ("distill.mapping=[[1, 9]]", "layer"),
        ("student.width=7", "width"),
        ("data.text=txet", "did you mean"),
        ("data.max_tokens=4000", "data.max_tokens must be at most"),
        ("teacher=/nowhere/model", "teacher must be"),
        ("train.trackers=[nonsense]", "train.trackers must be"),
        ("train.accumulation=7", "data.rows must be at least"),
    ],
)
def test_errors_are_one_message_with_code_2_and_nothing_is_trained(assets, tmp_path, more, message):
    result = invoke("train", *settings(assets, tmp_path / "run", "classification", more))
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_resume_with_other_settings_says_what_changed(assets, finished):
    folder = finished["classification"]
    result = invoke("train", *settings(assets, folder, "classification", "distill.beta=2"))
    assert result.exit_code == 2
    assert "distill.beta: 2.0, was 1.0" in " ".join(result.output.split())


@pytest.mark.parametrize("changed", ["data", "weights of the teacher", "weights in student.path"])
def test_what_changed_under_the_same_settings_is_named_and_scored_again(tmp_path, changed):
    assets = make_assets(tmp_path)
    shutil.copytree(assets / "encoder", assets / "start")
    values = [f"student.path={assets / 'start'}", "student.layers=null", "student.width=null"]
    arguments = settings(assets, tmp_path / "run", "classification", *values)
    assert invoke("train", *arguments).exit_code == 0
    before = json.loads((tmp_path / "run" / "results.json").read_text())
    if changed == "data":
        rows = (assets / "rows.jsonl").read_text().splitlines()
        (assets / "rows.jsonl").write_text("\n".join(rows[:60]))
    else:
        path = assets / ("encoder" if "teacher" in changed else "start") / "model.safetensors"
        tensors = load_file(path)
        torch.manual_seed(1)
        save_file({k: t + torch.randn(t.shape) for k, t in tensors.items()}, path, {"format": "pt"})
    result = invoke("train", *arguments)
    assert result.exit_code == 0, result.output
    shown = " ".join(result.output.split())
    told = f"step-00000008 must be of this training: got one of other {changed}; it is not used"
    assert told in shown
    assert shown.count("teacher: accuracy") == 1
    # What it says is so of a new folder too.
    anew = settings(assets, tmp_path / "anew", "classification", *values)
    assert invoke("train", *anew).exit_code == 0
    after, expected = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("run", "anew")
    )
    for name in ("teacher", "start", "student"):
        assert after[name] == expected[name], name
    assert (before["teacher"], before["start"]) != (after["teacher"], after["start"])


def test_a_training_without_a_step_does_not_bind_its_folder(assets, finished, tmp_path):
    wrong = ["distill.heads=[0, 1]", "distill.beta=2"]
    result = invoke("train", *settings(assets, tmp_path / "run", "classification", *wrong))
    assert result.exit_code == 2
    assert "heads" in result.output
    assert (tmp_path / "run" / "config.yaml").is_file()
    result = invoke("train", *settings(assets, tmp_path / "run"))
    assert result.exit_code == 0, result.output
    assert_same_weights(tmp_path / "run", finished["classification"])


def test_how_it_is_watched_may_change(assets, finished):
    folder = finished["classification"]
    result = invoke("train", *settings(assets, folder, "classification", "train.log_every=4"))
    assert result.exit_code == 0, result.output


def test_an_output_that_cannot_be_written_is_an_error_before_any_work(assets, tmp_path):
    (tmp_path / "file").write_text("")
    result = invoke("train", *settings(assets, tmp_path / "file" / "run"))
    assert result.exit_code == 2, result.output
    assert "output must be a folder that can be written" in " ".join(result.output.split())


def test_doctor_says_what_is_there():
    result = invoke("doctor")
    assert result.exit_code == 0, result.output
    for text in ("reference", "cpu", "triton", "transformers", "accelerator:"):
        assert text in result.output
