"""Data ready to train on: read, checked, split, tokenised once."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..config import DataConfig
from ..metrics import is_greater_better
from .blocks import cut_blocks, pack, spread_indices, token_ids
from .labelled import TEST_SHARE, hide_labels
from .labels import class_names, names_of_outputs, to_targets
from .rows import Rows, read_rows
from .tokens import encode_once, tokenizer_hash


@dataclass(frozen=True)
class Prepared:
    """Token ids of all rows, split.

    Rows have `input_ids`; for classification also `attention_mask` and `label` (a class index, or
    a number for regression), for packed language models also `position_ids`.
    """

    name: str
    # Names of the classes; None for regression and language models.
    labels: list[str] | None
    # Empty where a model is only scored.
    train: Dataset
    # Scored; the checkpoint that is best here, by the first metric, is the best.
    test: Dataset
    # Names in `fakd.metrics`.
    metrics: tuple[str, ...]
    # A hash of all of it: rows, tokens and labels.
    fingerprint: str
    # Scored besides, by name.
    more_tests: dict[str, Dataset] = field(default_factory=dict)
    # Rows of `train` that show their label; None if all do.
    labelled: list[int] | None = None
    # Rows without text or label, which were left out.
    dropped: int = 0

    @property
    def is_greater_better(self) -> bool:
        """Whether a greater first metric is better."""
        return is_greater_better(self.metrics[0])

    def rows_hash(self) -> str:
        """Of the rows that are scored, their tokens and labels, in their order."""
        found = hashlib.sha256()
        for name, part in {"test": self.test, **self.more_tests}.items():
            found.update(name.encode())
            for batch in part.with_format(None).iter(1000):
                found.update(repr(batch).encode())
        return found.hexdigest()[:32]

    def describe(self) -> str:
        """What it is, in one sentence."""
        if "label" in self.test.column_names:
            kind = "texts with a number each"
            if self.labels is not None:
                kind = f"texts of {len(self.labels)} classes"
        else:
            kind = f"blocks of {len(self.test[0]['input_ids'])} tokens"
        if len(self.train) == 0:
            parts = [f"{len(self.test)} {kind} to score"]
        else:
            parts = [f"{len(self.train)} {kind} to train on", f"{len(self.test)} held out"]
        if self.labelled is not None:
            parts[0] += f" ({len(self.labelled)} show their label)"
        parts += [f"{len(rows)} of {name} besides" for name, rows in self.more_tests.items()]
        left_out = f"; {self.dropped} without text or label were left out" if self.dropped else ""
        return f"{self.name}: {', '.join(parts)}{left_out}."


def prepare(
    config: DataConfig,
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    order: Sequence[str] | None = None,
) -> Prepared:
    """Read, check, split and tokenise; a second call reads the token ids from the cache.

    Where a source has nothing to score, a fifth is held out: of labelled texts by their hash, but
    no class whole; of a language model's blocks the last.

    Args:
        config: see `DataConfig`.
        task: "classification" (also regression, where labels have fractions) or "causal_lm".
        tokenizer: of the models.
        order: classes in the order of a model's outputs, which counts if these are the data's.

    Raises:
        ModuleNotFoundError, OSError, ValueError: data that are not there, cannot be read, lack a
            column, are empty, or do not fit the task.
    """
    _check_settings(config, task)
    rows = read_rows(config, task)
    if task == "causal_lm":
        return _prepare_blocks(rows, config, tokenizer)
    classes = class_names(rows.splits["train"], config.label, rows.name, order)
    if classes is None and config.labels_per_class is not None:
        raise ValueError(
            f"data.labels_per_class must be absent for regression: got {config.labels_per_class}; "
            "drop it."
        )
    return _prepare_labelled(rows, config, tokenizer, classes)


def prepare_test(
    config: DataConfig,
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    outputs: Sequence[str] | None,
) -> Prepared:
    """What a model is scored on that needs no training: held-out splits, or else all rows.

    Args:
        config: see `DataConfig`.
        task: as for `prepare`.
        tokenizer: of the model.
        outputs: the model's names of its classes, in order; None without classes.

    Raises:
        As `prepare` does; or ValueError, see `names_of_outputs`.
    """
    _check_settings(config, task)
    rows = read_rows(config, task, is_scored_only=True)
    if task == "causal_lm":
        return _prepare_blocks(rows, config, tokenizer)
    classes = names_of_outputs(list(rows.splits.values()), config.label, outputs)
    return _prepare_labelled(rows, config, tokenizer, classes)


def lengths(rows: Dataset) -> np.ndarray:
    """Tokens of each row, [N]."""
    table = rows.select_columns("input_ids").with_format("arrow")[:]
    return pc.list_value_length(table["input_ids"]).to_numpy()


def _check_settings(config: DataConfig, task: str) -> None:
    if task != "causal_lm":
        return
    for name in ("text_pair", "labels_per_class"):
        if (value := getattr(config, name)) is not None:
            raise ValueError(
                f"data.{name} must be absent for language models: got {value!r}; drop it."
            )


def _prepare_labelled(
    rows: Rows,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    classes: Sequence[str] | None,
) -> Prepared:
    def encode(batch: dict) -> dict:
        # Of one segment all token types would be 0.
        types = None if len(rows.columns) > 1 else False
        texts = [batch[column] for column in rows.columns]
        return tokenizer(
            *texts, truncation=True, max_length=config.max_tokens, return_token_type_ids=types
        )

    splits, keys = {}, []
    for split, part in rows.splits.items():
        targets = to_targets(part, config.label, classes, f"the split {split!r}")
        if split != "train" and config.test_rows is not None:
            chosen = np.random.default_rng(0).permutation(len(part))[: config.test_rows].tolist()
            part, targets = part.select(chosen), [targets[index] for index in chosen]
        tokens, key = encode_once(
            part.select_columns(rows.columns), encode, _settings(config, tokenizer)
        )
        splits[split] = tokens.add_column("label", targets)
        if split != "train":
            # Texts of like length side by side: little padding, and the scores are the same.
            splits[split] = splits[split].select(np.argsort(lengths(tokens), kind="stable"))
        keys += [key, targets]
    train, labelled = splits.pop("train", splits["test"].select([])), None
    if config.labels_per_class is not None and len(train):
        train, labelled = hide_labels(train, config.labels_per_class, seed=0)
    usual = ("pearson", "spearmanr") if classes is None else ("accuracy", "macro_f1")
    return Prepared(
        name=rows.name,
        labels=classes,
        train=train,
        test=splits.pop("test"),
        metrics=rows.metrics or usual,
        fingerprint=_fingerprint(classes, labelled, *keys),
        more_tests=splits,
        labelled=labelled,
        dropped=rows.dropped,
    )


def _prepare_blocks(rows: Rows, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    def encode(batch: dict) -> dict:
        documents = token_ids(tokenizer, batch[rows.columns[0]])
        if config.layout == "packed":
            return pack(documents, config.max_tokens)
        return {"input_ids": cut_blocks(documents, config.max_tokens)}

    blocks, keys = {}, []
    settings = _settings(config, tokenizer) | {"layout": config.layout}
    for split, part in rows.splits.items():
        blocks[split], key = encode_once(part.select_columns(rows.columns), encode, settings)
        keys.append(key)
    if "test" not in blocks:
        whole = blocks["train"]
        kept = len(whole) - math.ceil(TEST_SHARE * len(whole))
        blocks["train"] = whole.select(range(kept))
        blocks["test"] = whole.select(range(kept, len(whole)))
    for split, part in blocks.items():
        if len(part) == 0:
            texts = "texts" if config.layout == "packed" else "a text"
            raise ValueError(
                f"{rows.name} must have {texts} of {config.max_tokens} tokens or more to fill a "
                f"block of {split!r}: got fewer; pass longer texts, or lower data.max_tokens."
            )
        if split != "train" and config.test_rows is not None:
            blocks[split] = part.select(spread_indices(len(part), config.test_rows))
    return Prepared(
        name=rows.name,
        labels=None,
        train=blocks.pop("train", blocks["test"].select([])),
        test=blocks.pop("test"),
        metrics=("perplexity",),
        fingerprint=_fingerprint(config.test_rows, *keys),
        more_tests=blocks,
        dropped=rows.dropped,
    )


def _settings(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """What token ids depend on besides the rows."""
    return {"tokenizer": tokenizer_hash(tokenizer), "max_tokens": config.max_tokens}


def _fingerprint(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
