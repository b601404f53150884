"""Labels of any kind as class indices, or as numbers for regression."""

import math
from collections.abc import Sequence

from datasets import ClassLabel, Dataset

from .sources import nearest


def check_column(rows: Dataset, column: str, setting: str) -> None:
    """Raise where rows lack the column that a setting names; the message has the nearest one."""
    if column not in rows.column_names:
        raise ValueError(
            f"{setting} must be a column of the data: got {column!r}; "
            + nearest(column, rows.column_names)
        )


def class_names(rows: Dataset, column: str, name: str) -> list[str] | None:
    """The classes, from the training rows; None where labels are numbers to come close to.

    Floats are such numbers. A `ClassLabel` has names already; integers and strings are sorted.

    Raises:
        ValueError: fewer than two classes.
    """
    feature = rows.features[column]
    if isinstance(feature, ClassLabel):
        names = list(feature.names)
    elif str(getattr(feature, "dtype", "")).startswith(("float", "double")):
        return None
    else:
        names = [str(value) for value in sorted(set(rows[column][:]))]
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
    if unknown := sorted({str(value) for value in values} - set(place)):
        raise ValueError(
            f"{split} must have no class but those of the training rows: got "
            f"{', '.join(map(repr, unknown[:5]))} in {column}; pass more data, or another split."
        )
    return [place[str(value)] for value in values]
