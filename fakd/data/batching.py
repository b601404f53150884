"""Which rows go into which step, which process and which micro-batch; and rows as tensors."""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from ..config import DataConfig
from .blocks import causal_labels
from .prepared import Prepared, lengths

_WINDOW = 50  # batches among which rows are sorted by length: little padding, still random


def plan(
    prepared: Prepared, config: DataConfig, steps: int | None, epochs: float | None, seed: int
) -> list[list[int]]:
    """Rows of `prepared.train` of each optimiser step, over all processes.

    Every row comes once in an epoch. Steps of an epoch differ in size by one row at most, and hold
    rows of like length. Where labels are hidden, each step has `config.labelled_rows` rows that
    show theirs, then others, see `mixed_batches`; an epoch goes once through the others.

    Args:
        prepared: the data.
        config: see `DataConfig`.
        steps: how many; None goes by epochs.
        epochs: how many, if not `steps`.
        seed: of the order; the same seed gives the same plan.
    """
    if (steps is None) == (epochs is None):
        raise ValueError(
            f"exactly one of steps and epochs must be given: got {steps} and {epochs}; keep one."
        )
    count = len(prepared.train)
    if prepared.labelled is not None:
        labelled, others = config.labelled_rows, config.rows - config.labelled_rows
        if others < 0:
            raise ValueError(
                f"data.labelled_rows must be at most data.rows: got {labelled} and {config.rows}; "
                "lower it."
            )
        per_epoch = math.ceil(count / others if others else len(prepared.labelled) / labelled)
        steps = steps or max(1, round(epochs * per_epoch))
        return mixed_batches(prepared.labelled, range(count), (labelled, others), steps, seed)
    per_epoch = math.ceil(count / config.rows)
    steps = steps or max(1, round(epochs * per_epoch))
    generator, sizes = np.random.default_rng(seed), lengths(prepared.train)
    planned: list[list[int]] = []
    while len(planned) < steps:
        planned += _epoch(sizes, config.rows, per_epoch, generator)
    return planned[:steps]


def split(
    planned: Sequence[Sequence[int]], processes: int, process: int, accumulation: int
) -> list[list[int]]:
    """One process's micro-batches, in order: `accumulation` of them for each step.

    The rows of a step are dealt out like cards, so that micro-batches differ by one row at most,
    and are alike in their lengths and in how many labels they show.

    Args:
        planned: what `plan` gave.
        processes: how many train together.
        process: which one, from 0.
        accumulation: micro-batches of each process in one step.

    Raises:
        ValueError: a step with fewer rows than micro-batches.
    """
    hands = processes * accumulation
    fewest = min(map(len, planned), default=hands)
    if fewest < hands:
        raise ValueError(
            f"data.rows must be at least processes x accumulation = {processes} x {accumulation}: "
            f"got a step of {fewest} rows; raise data.rows, or lower train.accumulation."
        )
    return [
        list(rows[turn * processes + process :: hands])
        for rows in planned
        for turn in range(accumulation)
    ]


def mixed_batches(
    labelled: Sequence[int], others: Sequence[int], sizes: tuple[int, int], steps: int, seed: int
) -> list[list[int]]:
    """Indices of each step's rows: so many labelled ones, so many others.

    Both lists are walked through in shuffled order again and again. The whole plan is made at
    the start, so that runs that are compared see the same rows in the same order.
    """
    generator = torch.Generator().manual_seed(seed)
    streams = [_endless(rows, generator) for rows in (labelled, others)]
    return [
        [next(stream) for stream, size in zip(streams, sizes, strict=True) for _ in range(size)]
        for _ in range(steps)
    ]


def collate(
    tokenizer: PreTrainedTokenizerBase, task: str
) -> Callable[[list[dict]], dict[str, Tensor]]:
    """What makes a batch of rows of a `Prepared`.

    Returns:
        For classification: entries padded to the longest row, [B, T], and `labels` [B]. For
        "causal_lm": blocks stacked, [B, T], and `labels` [B, T], to be shifted by the model.
        Packed blocks have `position_ids` and no `attention_mask`: from that, and without a cache
        of keys and values (`use_cache=False`), transformers keeps the documents apart.

    Raises:
        ValueError: a tokenizer without a token for padding, for classification.
    """
    if task == "causal_lm":
        return _stack
    if tokenizer.pad_token is None:
        raise ValueError(
            f"tokenizer must have a token for padding: got none in {type(tokenizer).__name__}; "
            "set its pad_token, and the model's pad_token_id."
        )
    return DataCollatorWithPadding(tokenizer)


def _stack(rows: list[dict]) -> dict[str, Tensor]:
    batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    if "position_ids" not in batch:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["labels"] = causal_labels(batch["input_ids"], batch.get("position_ids"))
    return batch


def _epoch(
    sizes: np.ndarray, rows: int, steps: int, generator: np.random.Generator
) -> list[list[int]]:
    """All rows once, in steps of almost equal size."""
    order = generator.permutation(len(sizes))
    windows = [
        part[np.argsort(sizes[part], kind="stable")]
        for part in np.split(order, range(_WINDOW * rows, len(order), _WINDOW * rows))
    ]
    batches = np.array_split(np.concatenate(windows), steps)
    return [batches[index].tolist() for index in generator.permutation(steps)]


def _endless(rows: Sequence[int], generator: torch.Generator) -> Iterator[int]:
    if not rows:
        raise ValueError("a batch must have rows to draw from: got none; pass more data.")
    while True:
        for place in torch.randperm(len(rows), generator=generator).tolist():
            yield rows[place]
