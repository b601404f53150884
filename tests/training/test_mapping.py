"""Layer maps: presets on integers, and errors that name the mistake."""

import pytest

from fakd import layer_pairs
from fakd.mapping import all_layers, first_k, last, last_k, uniform


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (2, 6, [(1, 3), (2, 6)]),
        (3, 6, [(1, 2), (2, 4), (3, 6)]),
        (4, 6, [(1, 2), (2, 3), (3, 5), (4, 6)]),
        (6, 6, [(k, k) for k in range(1, 7)]),
        (1, 12, [(1, 12)]),
        (4, 2, [(1, 1), (2, 1), (3, 2), (4, 2)]),
    ],
)
def test_uniform(student, teacher, expected):
    assert uniform(student, teacher) == expected
    assert layer_pairs("uniform", student, teacher) == expected


def test_presets():
    assert last(3, 12) == layer_pairs("last", 3, 12) == [(3, 12)]
    assert last_k(3, 12, 2) == layer_pairs("last_2", 3, 12) == [(2, 11), (3, 12)]
    assert first_k(3, 12, 2) == layer_pairs("first_2", 3, 12) == [(1, 1), (2, 2)]
    assert all_layers(2, 6) == layer_pairs("all", 2, 6) == [(0, 0), (1, 3), (2, 6)]


def test_explicit_pairs_keep_their_order():
    assert layer_pairs([(2, 6), [0, 0], (2, 5)], 2, 6) == [(2, 6), (0, 0), (2, 5)]


@pytest.mark.parametrize(
    ("mapping", "match"),
    [
        ("unifrom", r"got 'unifrom'; did you mean 'uniform'\?"),
        ("everything", "mapping must be 'uniform'"),
        ("last_k", "put the number in place of k, as in 'last_3'"),
        ("first_k", "put the number in place of k, as in 'first_3'"),
        ("first_4", "k of mapping 'first_k' must be from 1 to 3, .* got 4"),
        ("last_4", "k of mapping 'last_k' must be from 1 to 3, .* got 4"),
        ("last_0", "from 1 to 3, .* got 0"),
        ([], "at least one pair: got an empty list"),
        ([(1, 7)], r"mapping\[0\] must name a teacher layer from 0 .* to 6: got 7"),
        ([(1, 1), (4, 2)], r"mapping\[1\] must name a student layer from 0 .* to 3: got 4"),
        ([(-1, 2)], "got -1"),
        ([(1, 2), (1, 2)], r"must name each pair once: got \(1, 2\) twice"),
    ],
)
def test_impossible_maps(mapping, match):
    with pytest.raises(ValueError, match=match):
        layer_pairs(mapping, 3, 6)


@pytest.mark.parametrize("pair", [1, (1,), (1, 2, 3), (1, 2.0), ("1", 2), (True, 1)])
def test_pairs_are_two_integers(pair):
    with pytest.raises(TypeError, match=r"mapping\[0\] must be \(student_layer, teacher_layer\)"):
        layer_pairs([pair], 3, 6)


@pytest.mark.parametrize(("student", "teacher"), [(0, 6), (3, 0)])
def test_models_have_blocks(student, teacher):
    with pytest.raises(ValueError, match="must be at least 1: got 0"):
        layer_pairs("uniform", student, teacher)
