"""The line of a launch's table: what a program is told of its layer pair.

All kernels see a pair through the same line. A program keeps a block of `own` rows and meets blocks
of `other` rows: own queries meet keys in the forward kernel and for dQ, own keys meet queries for
dK. Only rows with -before <= other - own <= after meet, which causality and windows come down to.
"""

import struct

import triton.language as tl
from torch import Tensor

_PAIR_FIELDS = (
    *("first", "pair", "weights", "tokens", "begin", "end", "lower", "upper", "before", "after"),
    *("teacher_heads", "student_sums", "teacher_sums", "balance", "center", "map"),
    *("slots", "batches", "grad", "column", "factor"),
)
_SIDE_FIELDS = (
    *("own", "own_batch", "own_head", "own_token"),
    *("other", "other_batch", "other_head", "other_token"),
    *("heads", "own_group", "other_group", "width", "inner", "outer"),
)
_NAMES = (
    *_PAIR_FIELDS,
    *(f"student_{name}" for name in _SIDE_FIELDS),
    *(f"teacher_{name}" for name in _SIDE_FIELDS),
)


def _places(*names: str, start: str = "first") -> list[tl.constexpr]:
    """Where fields are, counted from the field `start`."""
    return [tl.constexpr(_NAMES.index(name) - _NAMES.index(start)) for name in names]


FIELDS = tl.constexpr(len(_NAMES))
# Of a pair. Own rows are [begin, end), other rows [lower, upper).
PAIR, WEIGHTS, TOKENS = _places("pair", "weights", "tokens")
BEGIN, END, LOWER, UPPER = _places("begin", "end", "lower", "upper")
BEFORE, AFTER, TEACHER_HEADS = _places("before", "after", "teacher_heads")
# Addresses of float32: what `store_sums` keeps, [2, B, H, T] (H the student's heads, but for the
# sums of a teacher whose heads are averaged); [B, H, T]; [B, rows, T]. Slots are float64.
STUDENT_SUMS, TEACHER_SUMS = _places("student_sums", "teacher_sums")
BALANCE, CENTER = _places("balance", "center")
MAP, SLOTS, BATCHES = _places("map", "slots", "batches")
GRAD, COLUMN, FACTOR = _places("grad", "column", "factor")
STUDENT, TEACHER = _places("student_own", "teacher_own")
# Of a side. A tensor is an address and three strides; head h uses head h // group of it.
OWN, OTHER, HEADS, OWN_GROUP, OTHER_GROUP, WIDTH, INNER, OUTER = _places(
    *(f"student_{name}" for name in ("own", "other", "heads", "own_group", "other_group")),
    *(f"student_{name}" for name in ("width", "inner", "outer")),
    start="student_own",
)


def make_line(**values: int | float | Tensor | None) -> list[int | Tensor | None]:
    """Values by the names of fields, in the order of the table; those left out are 0."""
    unknown = values.keys() - set(_NAMES)
    assert not unknown, unknown
    return [_bits(v) if isinstance(v, float) else v for v in map(values.get, _NAMES)]


def _bits(value: float) -> int:
    """The bits of a float32."""
    return struct.unpack("<i", struct.pack("<f", value))[0]
