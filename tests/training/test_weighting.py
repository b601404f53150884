"""Weights that change: schedules, balance, and their state."""

import pytest
import torch

from fakd import DistillConfig, Distiller, TrainConfig
from fakd.train import train
from fakd.weighting import SCHEDULES, WEIGHTS
from tests.support.models import tiny_batch, tiny_lm, tiny_model

ALL = DistillConfig(alpha=0.5, beta=1.0, gamma=0.3, delta=2.0, temperature=2.0)
CONFIGURED = {"task_weight": 1.0, "alpha": 0.5, "beta": 1.0, "gamma": 0.3, "delta": 2.0}


def make(is_lm=False, **changes):
    torch.manual_seed(0)
    options = {**vars(ALL), **changes}
    if is_lm:
        return Distiller.from_config(tiny_lm(), tiny_lm(layers=2), DistillConfig(**options))
    models = tiny_model(labels=3), tiny_model(layers=2, labels=3)
    return Distiller.from_config(*models, DistillConfig(**options))


def batches(count, is_lm=False):
    made = [tiny_batch(labels=None if is_lm else 3, seed=seed) for seed in range(count)]
    if is_lm:
        for batch in made:
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return made


def run(distiller, count=4, **options):
    given = batches(count, is_lm=distiller._is_headless)
    config = TrainConfig(learning_rate=1e-3, log_every=1, **options)
    return train(distiller, given, config)


@pytest.mark.parametrize("is_lm", [False, True])
@pytest.mark.parametrize("name", CONFIGURED)
@pytest.mark.parametrize(("schedule", "factors"), [("fall", (7, 5, 3, 1)), ("rise", (1, 3, 5, 7))])
def test_a_scheduled_weight_follows_its_schedule_and_the_others_stay(
    is_lm, name, schedule, factors
):
    log = run(make(is_lm, schedules={name: schedule}))
    term = WEIGHTS[name][2]
    for line, factor in zip(log, factors, strict=True):
        square = 4.0 if term == "soft" else 1.0  # the temperature's
        expected = CONFIGURED[name] * factor / 8 * square * line[term]
        assert line[f"weighted_{term}"] == pytest.approx(expected, rel=1e-5)
        total = sum(value for key, value in line.items() if key.startswith("weighted_"))
        assert line["loss"] == pytest.approx(total, rel=1e-5)
        for other, value in CONFIGURED.items():
            if other != name and other != "alpha":
                key = WEIGHTS[other][2]
                assert line[f"weighted_{key}"] == pytest.approx(value * line[key], rel=1e-5)


@pytest.mark.parametrize("is_lm", [False, True])
def test_balanced_terms_weigh_what_their_weights_say(is_lm):
    distiller = make(is_lm, balance=True)
    log = run(distiller, count=3)
    means = {}
    for line in log:
        for name, (_, _, term) in WEIGHTS.items():
            square = 4.0 if term == "soft" else 1.0
            expected = CONFIGURED[name] * square * line[term] / means.get(term, 1.0)
            assert line[f"weighted_{term}"] == pytest.approx(expected, rel=1e-4), term
        for _, _, term in WEIGHTS.values():
            means[term] = 0.95 * means[term] + 0.05 * line[term] if term in means else line[term]
    state = distiller.state_dict()["weighting.means"]
    expected = torch.tensor([means[term] for _, _, term in WEIGHTS.values()])
    torch.testing.assert_close(state, expected)


def test_constant_weights_are_those_of_no_weighting():
    plain, scheduled = make(), make(schedules=dict.fromkeys(CONFIGURED, "constant"))
    assert not any("weighting" in name for name in plain.state_dict())
    losses = [[line["loss"] for line in run(distiller)] for distiller in (plain, scheduled)]
    assert losses[0] == losses[1]


def test_learned_weights_are_learned():
    distiller = make(learn_weights=True)
    run(distiller)
    assert (distiller.feature.log_weights != 0).all()


def test_factors_begin_and_end_where_they_say():
    assert [SCHEDULES[name](0.0) for name in ("constant", "fall", "rise")] == [1, 1, 0]
    assert [SCHEDULES[name](1.0) for name in ("constant", "fall", "rise")] == [1, 0, 1]


@pytest.mark.parametrize(
    ("schedules", "message"),
    [
        ({"zeta": "fall"}, "the names in schedules must be one of 'task_weight', .*got 'zeta'"),
        ({"beta": "jump"}, "schedules.beta must be one of .*got 'jump'"),
    ],
)
def test_unknown_schedules_are_named(schedules, message):
    with pytest.raises(ValueError, match=message):
        DistillConfig(schedules=schedules)
