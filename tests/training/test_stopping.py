"""Signals end a training after a step, with a checkpoint that the same command goes on from."""

import json
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from fakd import run, stopping
from tests.support.runs import invoke, make_assets, settings


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield make_assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture(scope="module")
def finished(assets, tmp_path_factory):
    """The output folder of a training without a stop."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    result = invoke("train", *settings(assets, folder))
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(autouse=True)
def _in_the_foreground():
    """Jobs in the background ignore SIGINT, these tests among them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def on_step(monkeypatch, count, do):
    """Do something inside the n-th step of the optimizer."""
    original, calls = torch.optim.AdamW.step, []

    def step(*arguments, **options):
        calls.append(1)
        if len(calls) == count:
            do()
        return original(*arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)


@pytest.mark.parametrize(
    ("number", "code", "count", "kept"),
    [
        (signal.SIGINT, 130, 1, 1),
        (signal.SIGTERM, 143, 3, 3),
        (signal.SIGTERM, 143, 8, 8),  # a checkpoint is due then anyway
    ],
)
def test_a_signal_ends_a_training_with_a_checkpoint_to_go_on_from(
    assets, finished, tmp_path, monkeypatch, number, code, count, kept
):
    arguments = settings(assets, tmp_path / "run", "classification", "train.checkpoint_every=null")
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        on_step(patch, count, lambda: signal.raise_signal(number))
        result = invoke("train", *arguments)
    assert result.exit_code == code, result.output
    told = f"stopped after step {kept} of 8, which is kept; the same command goes on from there"
    assert told in " ".join(result.output.split())
    assert signal.getsignal(number) is before
    assert not (tmp_path / "run" / "results.json").exists()
    (path,) = (tmp_path / "run" / "checkpoints").iterdir()
    progress = json.loads((path / "progress.json").read_text())
    assert progress["step"] == kept
    assert (progress["scores"] is None) == (kept < 8)  # scores may take longer than there is time
    result = invoke("train", *arguments)
    assert result.exit_code == 0, result.output
    folders = tmp_path / "run", finished
    ours, theirs = (load_file(folder / "student" / "model.safetensors") for folder in folders)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    ours, theirs = (json.loads((folder / "results.json").read_text()) for folder in folders)
    assert ours["student"] == theirs["student"]


def test_a_second_signal_stops_at_once(assets, tmp_path, monkeypatch):
    def twice():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # as torchrun passes on
        later = time.monotonic() + 2
        monkeypatch.setattr(stopping.time, "monotonic", lambda: later)
        signal.raise_signal(signal.SIGINT)

    on_step(monkeypatch, 3, twice)
    arguments = settings(assets, tmp_path / "run", "classification", "train.checkpoint_every=null")
    result = invoke("train", *arguments)
    assert result.exit_code == 130, result.output
    assert "stopped at once" in result.output
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("name", ["build", "_save_student"])
def test_a_signal_outside_of_the_steps_says_what_there_is(assets, tmp_path, monkeypatch, name):
    monkeypatch.setattr(run, name, lambda *_: signal.raise_signal(signal.SIGTERM))
    result = invoke("train", *settings(assets, tmp_path / "run"))
    assert result.exit_code == 143, result.output
    told = {"build": "there is nothing to keep", "_save_student": "stopped after the last step"}
    assert told[name] in " ".join(result.output.split())


def test_what_is_to_outlast_signals_does():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stopping.StopSignals():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(stopping.Stopped):
            signal.raise_signal(signal.SIGTERM)
