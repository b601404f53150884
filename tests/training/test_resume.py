"""A training that goes on ends in bitwise the same weights as one that was never stopped."""

import copy
import json

import pytest
import torch

from fakd import TrainConfig
from fakd.train import _mix, train
from tests.support.models import tiny_batch
from tests.training.test_train import batches, make


class Kept:
    """Checkpoints in memory: goes on from `step`, and keeps the state after every save."""

    def __init__(self, step: int = 0, states: dict | None = None) -> None:
        self.step, self.states = step, {} if states is None else states

    def restore(self, _accelerator, *parts) -> int:
        if self.step:
            for part, state in zip(parts, copy.deepcopy(self.states[self.step]), strict=True):
                part.load_state_dict(state)
        return self.step

    def save(self, _accelerator, *parts_and_step) -> None:
        *parts, step = parts_and_step
        self.states[step] = copy.deepcopy([part.state_dict() for part in parts])


class Rows(torch.utils.data.Dataset):
    """Rows that remember when they were loaded."""

    def __init__(self, count: int) -> None:
        self.rows = [{k: v[0] for k, v in tiny_batch(1, labels=3, seed=s).items()} for s in count]
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        self.loaded.append(index)
        return self.rows[index]


@pytest.mark.parametrize("is_loader", [True, False], ids=["DataLoader", "list"])
def test_going_on_is_bitwise_the_uninterrupted_training(is_loader, tmp_path):
    config = TrainConfig(learning_rate=1e-2, accumulation=2, log_every=2, checkpoint_every=3)
    path = tmp_path / "log.jsonl"

    def data():
        if not is_loader:
            return batches(16)
        return torch.utils.data.DataLoader(Rows(range(16)), batch_size=1, shuffle=True)

    whole, kept = make(), Kept()
    assert any(m.p > 0 for m in whole.modules() if isinstance(m, torch.nn.Dropout))
    log = train(whole, data(), config, checkpoints=kept, log_path=path)
    assert sorted(kept.states) == [3, 6, 8]
    written = path.read_text()
    # A line from after the checkpoint, and one that was cut off.
    path.write_text(written + written[:20])

    resumed, left = make(), data()
    torch.rand(7)
    again = train(resumed, left, config, checkpoints=Kept(6, kept.states), log_path=path)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert [line["step"] for line in again] == [2, 4, 6, 8]
    assert [json.loads(line) for line in path.read_text().splitlines()] == again
    seconds = {"step_seconds": 0.0}
    assert [line | seconds for line in again] == [line | seconds for line in log]
    if is_loader:
        assert len(left.dataset.loaded) == 4


def test_a_finished_training_takes_no_step():
    distiller, kept = make(), Kept()
    train(distiller, batches(2), TrainConfig(), checkpoints=kept)
    again = make()
    assert train(again, batches(2), TrainConfig(), checkpoints=Kept(2, kept.states)) == []
    for name, tensor in distiller.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_seeds_differ_between_steps_and_processes():
    numbers = [(seed, step, process) for seed in (0, 1) for step in (1, 2) for process in (0, 1)]
    seeds = {_mix(*n) for n in numbers}
    assert len(seeds) == len(numbers)
    assert all(0 <= seed < 2**63 for seed in seeds)
