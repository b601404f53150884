"""Rows of a source that can be used: by split, checked, those with blanks left out."""

from collections.abc import Sequence
from dataclasses import dataclass

from datasets import Dataset

from ..config import DataConfig
from .labelled import is_held_out
from .labels import are_classes, check_column, check_labels
from .sources import Source, nearest, read_source

_USUAL_TEXT = ("text", "sentence")  # columns, where neither settings nor source name one


@dataclass(frozen=True)
class Rows:
    """What there is to tokenise."""

    name: str
    # "train", unless a model is only scored; "test", unless a language model has to hold out
    # blocks; others that are scored.
    splits: dict[str, Dataset]
    # Of the text and, for pairs, of the second text.
    columns: list[str]
    # What scores are published for the source, if any.
    metrics: tuple[str, ...] | None
    # Rows without text or label, which were left out.
    dropped: int


def read_rows(config: DataConfig, task: str, *, is_scored_only: bool = False) -> Rows:
    """Read and check the rows of `config.source`.

    Where there is no split to score, a fifth of labelled texts is held out, but no class whole; or,
    where a model is only scored, all rows are scored.

    Raises:
        ModuleNotFoundError, OSError, ValueError: nothing there, nothing that can be read, no such
            split or column, no text in a column, or no rows.
    """
    source = read_source(config.source, config.name)
    splits = _choose_splits(source, config)
    if is_scored_only:
        splits.setdefault("test", splits.pop("train"))
    texts = _text_columns(source, config)
    for rows in splits.values():
        for setting, column in texts.items():
            check_column(rows, column, setting)
        if task == "classification":
            check_column(rows, config.label, "data.label")
            check_labels(rows, config.label)
    columns = list(texts.values())
    needed = [*columns, config.label] if task == "classification" else columns
    whole = {split: _without_blanks(rows, needed) for split, rows in splits.items()}
    dropped = sum(map(len, splits.values())) - sum(map(len, whole.values()))
    _check_rows(source.name, whole, needed)
    for rows in whole.values():
        for setting, column in texts.items():
            _check_text(rows, column, setting)
    if task == "classification" and "test" not in whole:
        whole |= _hold_out(whole["train"], columns, config.label)
        _check_rows(source.name, whole, needed)
    return Rows(source.name, whole, columns, source.metrics, dropped)


def _choose_splits(source: Source, config: DataConfig) -> dict[str, Dataset]:
    for setting in ("train_split", "test_split"):
        split = getattr(config, setting)
        if split is not None and split not in source.splits:
            raise ValueError(
                f"data.{setting} must be a split of {source.name}: got {split!r}; "
                + nearest(split, list(source.splits))
            )
    chosen = {"train": source.splits[config.train_split]}
    listed = source.test_splits if config.test_split is None else (config.test_split,)
    there = [split for split in listed if split in source.splits and split != config.train_split]
    if there:
        chosen["test"] = source.splits[there[0]]
    if config.test_split is None:
        chosen |= {split: source.splits[split] for split in source.more_splits}
    return chosen


def _text_columns(source: Source, config: DataConfig) -> dict[str, str]:
    """Setting -> column, of the text and of its pair if there is one."""
    text, pair = config.text, config.text_pair
    if text is None and source.text is not None:
        text, pair = source.text, pair or source.text_pair
    elif text is None:
        there = source.splits[config.train_split].column_names
        text = next((column for column in _USUAL_TEXT if column in there), _USUAL_TEXT[0])
    return {"data.text": text} | ({} if pair is None else {"data.text_pair": pair})


def _check_rows(name: str, splits: dict[str, Dataset], needed: Sequence[str]) -> None:
    for split, rows in splits.items():
        if len(rows) == 0:
            raise ValueError(
                f"{name} must have rows to {'train on' if split == 'train' else 'score'}: "
                f"got none with {' and '.join(needed)} in {split!r}; pass more data."
            )


def _check_text(rows: Dataset, column: str, setting: str) -> None:
    feature = rows.features[column]
    if getattr(feature, "dtype", None) not in ("string", "large_string"):
        raise ValueError(
            f"{setting} must be a column of text: got {column!r} of {feature}; choose another."
        )


def _without_blanks(rows: Dataset, columns: Sequence[str]) -> Dataset:
    def is_there(value: object) -> bool:
        if isinstance(value, str):
            return bool(value.strip())
        return value is not None and value == value  # NaN is a blank in a column of numbers

    values = zip(*(rows[column][:] for column in columns), strict=True)
    kept = [index for index, row in enumerate(values) if all(map(is_there, row))]
    return rows if len(kept) == len(rows) else rows.select(kept)


def _hold_out(rows: Dataset, columns: Sequence[str], label: str) -> dict[str, Dataset]:
    """By the hash of the texts: the same in every run, equal texts on one side."""
    texts = list(map("\n".join, zip(*(rows[column][:] for column in columns), strict=True)))
    chosen = {text for text in texts if is_held_out(text)}
    if are_classes(rows, label):
        # A class that is held out whole could not be learned: its texts stay.
        labels = rows[label][:]
        kept = {name for name, text in zip(labels, texts, strict=True) if text not in chosen}
        chosen -= {text for name, text in zip(labels, texts, strict=True) if name not in kept}
    sides: tuple[list[int], list[int]] = ([], [])
    for index, text in enumerate(texts):
        sides[text in chosen].append(index)
    return {"train": rows.select(sides[0]), "test": rows.select(sides[1])}
