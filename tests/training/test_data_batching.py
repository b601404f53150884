"""Which rows go into which step, process and micro-batch; and rows as tensors."""

from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from fakd import data
from fakd.config import DataConfig
from tests.support.models import tiny_tokenizer


def prepared(count: int = 1000, labelled: list[int] | None = None) -> data.Prepared:
    """Rows of 2 to 60 tokens, most of them short."""
    sizes = 2 + np.random.default_rng(0).exponential(12, count).astype(int).clip(max=58)
    rows = {"input_ids": [[5] * size for size in sizes], "label": [0] * count}
    train = Dataset.from_dict(rows)
    return data.Prepared("rows", ["a", "b"], train, train, ("accuracy",), "x", labelled=labelled)


def padding(plan: list[list[int]], sizes: np.ndarray) -> int:
    """Tokens of padding over all steps."""
    return sum(sizes[rows].max() * len(rows) - sizes[rows].sum() for rows in plan)


@pytest.mark.parametrize("rows", [1, 7, 32, 1000, 5000])
def test_every_row_comes_once_in_an_epoch(rows):
    found = prepared()
    plan = data.plan(found, DataConfig("x", rows=rows), None, 2, seed=0)
    per_epoch = len(plan) // 2
    assert per_epoch == -(-1000 // rows)
    for epoch in (plan[:per_epoch], plan[per_epoch:]):
        assert sorted(row for step in epoch for row in step) == list(range(1000))
        sizes = {len(step) for step in epoch}
        assert max(sizes) <= rows
        assert max(sizes) - min(sizes) <= 1


def test_plans_depend_on_the_seed_alone():
    found, config = prepared(), DataConfig("x", rows=16)
    plan = data.plan(found, config, 200, None, seed=3)
    assert len(plan) == 200
    assert plan == data.plan(found, config, 200, None, seed=3)
    assert plan[:100] == data.plan(found, config, 100, None, seed=3)
    assert plan != data.plan(found, config, 200, None, seed=4)
    assert plan[:63] != plan[63:126]
    assert len(data.plan(found, config, None, 0.5, seed=0)) == 32
    for steps, epochs in ((None, None), (1, 1)):
        with pytest.raises(ValueError, match="exactly one of steps and epochs"):
            data.plan(found, config, steps, epochs, seed=0)


def test_buckets_need_little_padding_and_stay_random():
    found = prepared(5000)
    sizes = data.lengths(found.train)
    plan = data.plan(found, DataConfig("x", rows=20), None, 1, seed=0)
    order = np.random.default_rng(0).permutation(5000).tolist()
    shuffled = [order[start : start + 20] for start in range(0, 5000, 20)]
    assert padding(plan, sizes) < 0.1 * padding(shuffled, sizes)
    # Neither short nor long rows come first.
    means = [sizes[step].mean() for step in plan]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.2


def test_hidden_labels_are_mixed_in():
    labelled = [3, 5, 7, 11]
    found, config = prepared(100, labelled), DataConfig("x", rows=10, labelled_rows=2)
    plan = data.plan(found, config, 30, None, seed=0)
    assert plan == data.mixed_batches(labelled, range(100), (2, 8), 30, seed=0)
    assert len(data.plan(found, config, None, 2, seed=0)) == 26
    only = data.plan(found, DataConfig("x", rows=2, labelled_rows=2), None, 3, seed=0)
    assert Counter(row for step in only for row in step) == dict.fromkeys(labelled, 3)
    with pytest.raises(ValueError, match=r"labelled_rows must be at most data\.rows: got 8 and 4"):
        data.plan(found, DataConfig("x", rows=4), 1, None, seed=0)


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (2, 1), (1, 2), (3, 4), (2, 5)])
def test_processes_share_each_step_completely_and_evenly(processes, accumulation):
    found = prepared()
    plan = data.plan(found, DataConfig("x", rows=17), None, 1, seed=0)
    shares = [data.split(plan, processes, p, accumulation) for p in range(processes)]
    assert {len(share) for share in shares} == {len(plan) * accumulation}
    for step, rows in enumerate(plan):
        turns = range(step * accumulation, (step + 1) * accumulation)
        micro = [share[turn] for turn in turns for share in shares]
        assert sorted(row for part in micro for row in part) == sorted(rows)
        counts = [len(part) for part in micro]
        assert max(counts) - min(counts) <= 1
        totals = [sum(len(share[turn]) for turn in turns) for share in shares]
        assert max(totals) - min(totals) <= 1


def test_processes_share_lengths_and_labels_evenly():
    found = prepared()
    sizes = data.lengths(found.train)
    plan = data.plan(found, DataConfig("x", rows=32), None, 1, seed=0)
    loads = [[sizes[rows].sum() for rows in data.split(plan, 4, p, 1)] for p in range(4)]
    assert np.ptp(loads, axis=0).max() <= 0.35 * np.max(loads)
    mixed = data.mixed_batches([1, 2, 3], range(10, 50), (6, 26), 5, seed=0)
    for p in range(2):
        for rows in data.split(mixed, 2, p, 3):
            assert sum(row < 10 for row in rows) == 1


def test_steps_that_are_too_small():
    with pytest.raises(ValueError, match=r"processes x accumulation = 2 x 2: got a step of 3 rows"):
        data.split([[1, 2, 3, 4], [1, 2, 3]], 2, 0, 2)


def test_collated_classes_and_numbers():
    collate = data.collate(tiny_tokenizer(), "classification")
    rows = [
        {"input_ids": [1, 5, 2], "attention_mask": [1, 1, 1], "label": 1},
        {"input_ids": [1, 2], "attention_mask": [1, 1], "label": -100},
    ]
    batch = collate(rows)
    assert batch["input_ids"].tolist() == [[1, 5, 2], [1, 2, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [1, -100]
    labels = collate([{**row, "label": 0.5} for row in rows])["labels"]
    assert labels.dtype == torch.float32


def test_collated_blocks():
    batch = data.collate(tiny_tokenizer(), "causal_lm")([{"input_ids": [5, 6]}] * 2)
    assert batch["labels"].tolist() == batch["input_ids"].tolist() == [[5, 6], [5, 6]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 1]]


def test_padding_needs_a_token():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    with pytest.raises(ValueError, match="tokenizer must have a token for padding: got none"):
        data.collate(tokenizer, "classification")
    data.collate(tokenizer, "causal_lm")


def test_mixed_batches():
    labelled, others = [1, 2, 3], list(range(10))
    plan = data.mixed_batches(labelled, others, (2, 3), steps=6, seed=0)
    assert [len(batch) for batch in plan] == [5] * 6
    # Walked through completely before a row comes again.
    assert Counter(row for batch in plan for row in batch[:2]) == {1: 4, 2: 4, 3: 4}
    assert max(Counter(row for batch in plan for row in batch[2:]).values()) == 2
    assert plan == data.mixed_batches(labelled, others, (2, 3), steps=6, seed=0)
    assert plan != data.mixed_batches(labelled, others, (2, 3), steps=6, seed=1)
    with pytest.raises(ValueError, match="a batch must have rows to draw from"):
        data.mixed_batches([], others, (2, 3), steps=1, seed=0)
