"""Labels of any kind as class indices, or as numbers for regression."""

import math
from collections.abc import Sequence, Set

from datasets import ClassLabel, Dataset, Value

from .sources import nearest


def check_column(rows: Dataset, column: str, setting: str) -> None:
    """Raise where rows lack the column that a setting names; the message has the nearest one."""
    if column not in rows.column_names:
        raise ValueError(
            f"{setting} must be a column of the data: got {column!r}; "
            + nearest(column, rows.column_names)
        )


def check_labels(rows: Dataset, column: str) -> None:
    """Raise where a row may have several labels, or labels are of several kinds."""
    feature = rows.features[column]
    if not isinstance(feature, (ClassLabel, Value)):
        raise ValueError(
            "data.label must be a column of one text or one number for each row: got "
            f"{column!r} of {feature}; choose another, or keep one label."
        )


def are_classes(rows: Dataset, column: str) -> bool:
    """Whether labels are classes, and not numbers to come close to.

    Such numbers have fractions, one of them at least. Whole numbers are classes, written as 1 or as
    1.0: a blank makes floats of a column of integers.
    """
    return not any(isinstance(v, float) and not v.is_integer() for v in rows[column][:])


def class_names(
    rows: Dataset, column: str, name: str, order: Sequence[str] | None = None
) -> list[str] | None:
    """The classes, from the training rows; None for a regression, see `are_classes`.

    A `ClassLabel` has names already; others are sorted, numbers as such, written as texts or not.
    Where the classes in `order`, those of a teacher, are the same, its order counts.

    Raises:
        ValueError: fewer than two classes.
    """
    feature = rows.features[column]
    if isinstance(feature, ClassLabel):
        names = list(feature.names)
    elif not are_classes(rows, column):
        return None
    else:
        names = _sorted_names(set(rows[column][:]))
    if order is not None and sorted(order) == sorted(names):
        names = list(order)
    if len(names) < 2:
        raise ValueError(
            f"{name} must have at least two classes: got {names}; pass more data, or another "
            "data.label."
        )
    return names


def to_targets(
    rows: Dataset, column: str, classes: Sequence[str] | None, split: str
) -> list[int] | list[float]:
    """Each row's class index, or its number where `classes` is None.

    Raises:
        ValueError: a class that no training row has, a hidden label, a number that is not finite.
    """
    values = rows[column][:]
    if classes is None:
        values = [float(value) for value in values]
        if not all(map(math.isfinite, values)):
            raise ValueError(f"{column} must be finite in {split}: got inf; drop such rows.")
        return values
    if isinstance(rows.features[column], ClassLabel):
        own = rows.features[column].names
        values = [own[value] if value >= 0 else "(hidden)" for value in values]
    place = {name: index for index, name in enumerate(classes)}
    names = [_name(value) for value in values]
    if unknown := sorted(set(names) - set(place)):
        raise ValueError(
            f"{split} must have no class but those of the training rows: got "
            f"{', '.join(map(repr, unknown[:5]))} in {column}; pass more data, or another split."
        )
    return [place[name] for name in names]


def names_of_outputs(
    splits: Sequence[Dataset], column: str, outputs: Sequence[str] | None
) -> list[str] | None:
    """What the data call each output of a model that is scored, in its order.

    Labels are the model's own names; or whole numbers, which count its outputs from 0. Names of a
    `ClassLabel` that the model does not know, and any names where its own say nothing (LABEL_0),
    are taken in their order, if there are as many as outputs.

    Args:
        splits: all that is scored.
        column: of the labels.
        outputs: the model's names; None for a regression.

    Raises:
        ValueError: a label that is none of the model's, or no number for a regression.
    """
    values = {value for rows in splits for value in rows[column][:]}
    feature = splits[0].features[column]
    if outputs is None:
        if texts := sorted(value for value in values if isinstance(value, str)):
            raise ValueError(
                f"{column} must hold numbers, as the model has one output: got {texts[0]!r}; "
                "choose another data.label, or score a classifier."
            )
        return None
    if isinstance(feature, ClassLabel):
        given = {feature.names[value] if value >= 0 else "(hidden)" for value in values}
        theirs = [] if set(feature.names) & set(outputs) else list(feature.names)
    else:
        given = set(map(_name, values))
        is_mute = list(outputs) == [f"LABEL_{index}" for index in range(len(outputs))]
        theirs = _sorted_names(values) if is_mute else []
    counted = [] if any(map(str.isdecimal, outputs)) else list(map(str, range(len(outputs))))
    for names in (list(outputs), counted, theirs):
        if len(names) == len(outputs) and given <= set(names):
            return names
    unknown = sorted(given - set(outputs))
    raise ValueError(
        f"{column} must name classes of the model ({_listed(outputs)}): got {_listed(unknown)}; "
        "rename or drop such labels, or score another model."
    )


def _sorted_names(labels: Set[object]) -> list[str]:
    """Numbers in their order, written as texts or not."""
    are_numerals = all(isinstance(label, str) and label.isdecimal() for label in labels)
    return [_name(label) for label in sorted(labels, key=int if are_numerals else None)]


def _listed(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > 8 else ""
    return ", ".join(map(repr, names[:8])) + more


def _name(label: object) -> str:
    is_whole = isinstance(label, float) and label.is_integer()
    return str(int(label) if is_whole else label)
