"""Whole trainings on two processes, replicated and sharded: the same student, and resumable."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.support.runs import ROOT, invoke, make_assets, settings

# accelerate chooses FSDP2 on accelerators only; what it would lead to there is done here by hand.
COMMAND = """
import os, signal, sys
import torch
from fakd import distribute, train
from fakd.cli import app

def sharded(accelerator, distiller):
    distribute.shard(accelerator, distiller)
    return distribute.prepare(accelerator, distiller)

def step(*arguments, **options):
    calls.append(1)
    if len(calls) == 3 and os.environ["RANK"] == "1":
        signal.raise_signal(signal.SIGTERM)
    return original(*arguments, **options)

kind = sys.argv.pop(1)
if kind == "fsdp2":
    train.prepare = sharded
if kind == "stopped":
    original, calls = torch.optim.AdamW.step, []
    torch.optim.AdamW.step = step
app(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield make_assets(tmp_path_factory.mktemp("assets"))


def launch(kind, folder, *arguments, code=0):
    script = folder / "command.py"
    script.write_text(COMMAND, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(script), kind, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_two_processes_train_the_student_of_one(assets, tmp_path, task):
    folders = {kind: tmp_path / kind for kind in ("one", "ddp", "fsdp2")}
    options = (task, "train.learning_rate=1e-3")
    result = invoke("train", *settings(assets, folders["one"], *options))
    assert result.exit_code == 0, result.output
    found = {"one": weights(folders["one"])}
    for kind in ("ddp", "fsdp2"):
        shown = launch(kind, tmp_path, "train", *settings(assets, folders[kind], *options))
        assert shown.count("student at the start:") == 1  # one process speaks
        found[kind] = weights(folders[kind])
        assert found[kind].keys() == found["one"].keys()
    logs = {kind: log(folder) for kind, folder in folders.items()}
    assert [line["step"] for line in logs["fsdp2"]] == [2, 4, 6, 8]
    # Dropout, which the classifier has, draws other numbers in other processes.
    tolerance = 1e-3 if task == "causal_lm" else 0.02
    for kind in ("ddp", "fsdp2"):
        assert logs[kind][0]["loss"] == pytest.approx(logs["one"][0]["loss"], rel=tolerance)
    for name, tensor in found["ddp"].items():
        torch.testing.assert_close(found["fsdp2"][name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
def test_a_sharded_training_goes_on_to_the_same_bits(assets, tmp_path):
    folder, options = tmp_path / "run", ("classification", "train.keep=4")
    launch("fsdp2", tmp_path, "train", *settings(assets, folder, *options))
    before = weights(folder)
    last = max((folder / "checkpoints").glob("step-*"))
    shutil.rmtree(last)
    shutil.rmtree(folder / "student")
    launch("fsdp2", tmp_path, "train", *settings(assets, folder, *options))
    after = weights(folder)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_after_the_same_step(assets, tmp_path):
    options = ("causal_lm", "train.checkpoint_every=null")
    folders = {kind: tmp_path / kind for kind in ("ddp", "stopped")}
    launch("ddp", tmp_path, "train", *settings(assets, folders["ddp"], *options))
    arguments = settings(assets, folders["stopped"], *options)
    shown = launch("stopped", tmp_path, "train", *arguments, code=1)  # torchrun's own
    assert shown.count("stopped after step 4 of 8, which is kept") == 1
    launch("ddp", tmp_path, "train", *arguments)
    ours, theirs = (weights(folders[kind]) for kind in ("stopped", "ddp"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_a_comparison_runs_all_its_trainings_in_the_same_processes(assets, tmp_path):
    base = {
        "task": "classification",
        "teacher": str(assets / "encoder"),
        "student": {"layers": 2},
        "data": {"source": str(assets / "rows.jsonl"), "max_tokens": 12, "rows": 6},
        "steps": 2,
    }
    arms = {"labels": {"distill": {"beta": 0, "delta": 0}}, "features": {}}
    settings = {"title": "Tiny", "output": str(tmp_path / "out"), "base": base, "arms": arms}
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    shown = launch("ddp", tmp_path, "compare", str(path))
    assert shown.count("Tiny") == 1
    assert shown.count("teacher: accuracy") == 1  # scored once for all
    assert "features against labels" in " ".join(shown.split())
    assert (tmp_path / "out" / "report.html").is_file()


def weights(folder):
    return load_file(folder / "student" / "model.safetensors")


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
