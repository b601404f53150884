"""Checkpoints: whole or refused by name, the last and the best kept, a full disk survived."""

import errno
import io
import json

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console
from torch import nn
from transformers import get_linear_schedule_with_warmup

from fakd import Distiller, checkpoint
from fakd.checkpoint import BadCheckpoint, Checkpoints
from tests.support.models import tiny_batch, tiny_lm, tiny_model


class Training:
    """A distiller with an optimizer that takes steps, and its checkpoints."""

    def __init__(self, folder, *, seed=0, is_tied=False, **options):
        torch.manual_seed(seed)
        if is_tied:
            teacher, student = tiny_lm(layers=2), tiny_lm(layers=2, tie_word_embeddings=True)
        else:
            teacher, student = tiny_model(layers=2), tiny_model(layers=2, width=8)
        self.distiller = Distiller(teacher, student)
        self.optimizer = torch.optim.AdamW(self.distiller.parameters(), lr=0.01)
        self.schedule = get_linear_schedule_with_warmup(self.optimizer, 1, 10)
        self.screen = io.StringIO()
        console = Console(file=self.screen, width=200)
        options = {"keep": 2, "identity": {"data": "this"}, "console": console, **options}
        self.checkpoints = Checkpoints(folder, **options)
        self.parts = (Accelerator(cpu=True), self.distiller, self.optimizer, self.schedule)

    def step(self, count=1):
        for index in range(count):
            self.distiller(**tiny_batch(seed=index)).loss.backward()
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()

    def save(self, step):
        self.checkpoints.save(*self.parts, step)

    def restore(self):
        return self.checkpoints.restore(*self.parts)

    @property
    def names(self):
        return [path.name for path in self.checkpoints.paths()]


def assert_same(ours: nn.Module, theirs: nn.Module):
    states = ours.state_dict(), theirs.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_training_that_goes_on_is_the_one_that_was_not_interrupted(tmp_path, is_tied):
    first = Training(tmp_path, is_tied=is_tied)
    first.step(3)
    first.save(3)
    first.step(2)
    second = Training(tmp_path, seed=1, is_tied=is_tied)
    assert second.restore() == 3
    assert second.schedule.get_last_lr() != Training(tmp_path / "none").schedule.get_last_lr()
    second.step(2)
    assert_same(first.distiller, second.distiller)


def test_no_checkpoint_is_step_0(tmp_path):
    assert Training(tmp_path / "none").restore() == 0


def truncate(path):
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-10])


def flip_a_bit(path):
    data = bytearray((path / "optimizer.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "optimizer.safetensors").write_bytes(data)


def lose_a_file(path):
    (path / "progress.json").unlink()


def lose_the_manifest(path):
    (path / "manifest.json").unlink()


def cut_the_manifest(path):
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text[:20])


def not_a_manifest(path):
    (path / "manifest.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (truncate, "model.safetensors"),
        (flip_a_bit, "optimizer.safetensors"),
        (lose_a_file, "progress.json"),
        (lose_the_manifest, "manifest.json"),
        (cut_the_manifest, "manifest.json"),
        (not_a_manifest, "manifest.json"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_used(tmp_path, damage, what):
    first = Training(tmp_path)
    first.step(1)
    first.save(1)
    first.step(1)
    first.save(2)
    damage(tmp_path / "step-00000002")
    second = Training(tmp_path)
    assert second.restore() == 1
    shown = second.screen.getvalue()
    assert "checkpoint step-00000002 must have" in shown
    assert what in shown
    # And it is written again.
    second.step(1)
    second.save(2)
    assert Training(tmp_path).restore() == 2


def test_a_checkpoint_of_another_training_is_refused_by_name(tmp_path):
    Training(tmp_path, identity={"settings": "a", "data": "that"}).save(4)
    mine = Training(tmp_path, identity={"settings": "a", "data": "this"})
    assert mine.restore() == 0
    told = "checkpoint step-00000004 must be of this training: got one of other data; it is not"
    assert told in mine.screen.getvalue()
    with pytest.raises(BadCheckpoint, match="must hold a whole checkpoint"):
        mine.checkpoints.last()


def test_the_last_and_the_best_are_kept(tmp_path):
    scores = iter([0.2, 0.9, 0.9, 0.5, 0.4])
    training = Training(
        tmp_path, evaluate=lambda: {"accuracy": next(scores)}, worth=lambda s: s["accuracy"]
    )
    for step in range(1, 6):
        training.save(step)
    assert training.names == ["step-00000003", "step-00000004", "step-00000005"]
    assert training.checkpoints.best().name == "step-00000003"
    assert training.checkpoints.last().name == "step-00000005"
    assert training.checkpoints.verified(training.checkpoints.best())["scores"] == {"accuracy": 0.9}


def test_checkpoints_of_another_training_push_none_of_this_one_out(tmp_path):
    other = Training(tmp_path, identity={"data": "that"})
    other.save(4)
    other.save(8)
    training = Training(tmp_path)
    for step in (1, 2, 3):
        training.save(step)
    assert training.names == [f"step-0000000{step}" for step in (2, 3, 4, 8)]
    assert Training(tmp_path).restore() == 3


def test_without_scores_there_is_no_best(tmp_path):
    training = Training(tmp_path, keep=1)
    training.save(1)
    training.save(2)
    assert training.names == ["step-00000002"]
    assert training.checkpoints.best() is None


def test_a_full_disk_leaves_the_checkpoints_before(tmp_path, monkeypatch):
    training = Training(tmp_path)
    training.save(1)

    def fail(*_arguments, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        training.save(2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert Training(tmp_path).restore() == 1


def test_what_a_killed_process_left_is_cleared(tmp_path):
    (tmp_path / ".part-00000007").mkdir()
    (tmp_path / "step-00000009").mkdir()  # in the middle of its deletion
    training = Training(tmp_path)
    training.save(1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_only_the_student_is_taken_from_a_checkpoint(tmp_path):
    training = Training(tmp_path)
    training.save(1)
    state = training.checkpoints.student_state(training.checkpoints.last())
    assert state.keys() == training.distiller.student.state_dict().keys()
    progress = json.loads((tmp_path / "step-00000001" / "progress.json").read_text())
    assert progress["step"] == 1


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1: got 0"):
        Checkpoints(tmp_path, 0, identity={})
