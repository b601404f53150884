"""Which student layer learns from which teacher layer: pure functions on integers.

Layer k is hidden state k, counted as in Hugging Face's `hidden_states`: 0 is what enters the first
block (the embeddings), k is what leaves block k, and the last one leaves the last block. A map is
a list of (student_layer, teacher_layer).
"""

import difflib
import re
from collections.abc import Callable, Sequence
from functools import partial
from math import ceil
from typing import Any

LayerPairs = list[tuple[int, int]]
PRESETS = ("uniform", "last", "last_k", "first_k", "all")


def layer_pairs(
    mapping: str | Sequence[tuple[int, int]], student_layers: int, teacher_layers: int
) -> LayerPairs:
    """Turn a preset's name, or explicit pairs, into a checked map.

    Args:
        mapping: "uniform" | "last" | "last_3" | "first_3" (any number) | "all", or explicit pairs
            such as `[(1, 2), (3, 6)]`. See the function of each preset.
        student_layers: blocks of the student, > 0.
        teacher_layers: blocks of the teacher, > 0.

    Returns:
        (student_layer, teacher_layer) for each pair, in the order of the student's layers for
        presets and as given for explicit pairs.

    Raises:
        ValueError: unknown preset, no pair, a layer that the model lacks, a pair given twice.
        TypeError: a pair that is not two integers.
    """
    for name, count in (("student_layers", student_layers), ("teacher_layers", teacher_layers)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1: got {count}; pass the number of blocks.")
    if isinstance(mapping, str):
        pairs = _preset(mapping)(student_layers, teacher_layers)
    else:
        pairs = [_pair(index, pair) for index, pair in enumerate(mapping)]
    _check(pairs, student_layers, teacher_layers)
    return pairs


def attention_pairs(
    mapping: str | Sequence[tuple[int, int]] | None,
    pairs: LayerPairs,
    student_layers: int,
    teacher_layers: int,
) -> LayerPairs:
    """The map of attention, where layer k is the attention of block k.

    The embeddings, layer 0, have none: presets and the map of the hidden states leave them out,
    explicit pairs must not name them.

    Args:
        mapping: as in `layer_pairs`; None takes `pairs`.
        pairs: the map of the hidden states.
        student_layers: blocks of the student, > 0. teacher_layers: of the teacher.
    """
    found = pairs if mapping is None else layer_pairs(mapping, student_layers, teacher_layers)
    kept = [pair for pair in found if 0 not in pair]
    is_explicit = mapping is not None and not isinstance(mapping, str)
    if not kept or (is_explicit and len(kept) < len(found)):
        raise ValueError(
            f"the map of attention must name layers from 1: got {found}; the embeddings, layer 0, "
            "have no attention: pass pairs such as [(1, 2)] as attention_mapping."
        )
    return kept


def uniform(student_layers: int, teacher_layers: int) -> LayerPairs:
    """Spread the student's blocks evenly over the teacher's; the last learns from the last."""
    return [
        (layer, ceil(layer * teacher_layers / student_layers))
        for layer in range(1, student_layers + 1)
    ]


def last(student_layers: int, teacher_layers: int) -> LayerPairs:
    """The last block learns from the last block."""
    return last_k(student_layers, teacher_layers, 1)


def last_k(student_layers: int, teacher_layers: int, k: int) -> LayerPairs:
    """The last k blocks learn from the teacher's last k, one from one."""
    _check_k("last_k", k, student_layers, teacher_layers)
    return [(student_layers - i, teacher_layers - i) for i in reversed(range(k))]


def first_k(student_layers: int, teacher_layers: int, k: int) -> LayerPairs:
    """The first k blocks learn from the teacher's first k, one from one."""
    _check_k("first_k", k, student_layers, teacher_layers)
    return [(layer, layer) for layer in range(1, k + 1)]


def all_layers(student_layers: int, teacher_layers: int) -> LayerPairs:
    """Every hidden state of the student: the embeddings from the embeddings, then `uniform`."""
    return [(0, 0), *uniform(student_layers, teacher_layers)]


def check_mapping(name: str, mapping: Any) -> None:
    """Check what can be checked before the models are there.

    Args:
        name: of the setting, for messages.
        mapping: as `layer_pairs` takes it.

    Raises:
        ValueError: neither a preset nor pairs of numbers from 0.
    """
    if isinstance(mapping, str):
        _preset(mapping, name)
        return
    is_list = isinstance(mapping, (tuple, list))
    if not is_list or not all(_is_pair(pair) and min(pair) >= 0 for pair in mapping):
        raise ValueError(
            f"{name} must be the name of a preset, or pairs of a student's and a teacher's layer, "
            f"from 0: got {mapping!r}; write 'uniform' or [[1, 2], [2, 4]], for example."
        )


def _preset(name: str, setting: str = "mapping") -> Callable[[int, int], LayerPairs]:
    """What makes pairs of the numbers of layers, by the name of a preset."""
    if match := re.fullmatch(r"(last|first)_(\d+)", name):
        return partial({"last": last_k, "first": first_k}[match[1]], k=int(match[2]))
    presets = {"uniform": uniform, "last": last, "all": all_layers}
    if name in presets:
        return presets[name]
    if name in ("last_k", "first_k"):
        remedy = f"put the number in place of k, as in {name[:-1] + '3'!r}"
    else:
        close = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
        remedy = f"did you mean {close!r}?"
    raise ValueError(
        f"{setting} must be 'uniform', 'last', 'last_<number>', 'first_<number>', 'all' or a list "
        f"of pairs: got {name!r}; {remedy}"
    )


def _check_k(name: str, k: int, student_layers: int, teacher_layers: int) -> None:
    most = min(student_layers, teacher_layers)
    if not 1 <= k <= most:
        raise ValueError(
            f"k of mapping {name!r} must be from 1 to {most}, the blocks of the smaller model: "
            f"got {k}; choose fewer layers."
        )


def _pair(index: int, pair: Any) -> tuple[int, int]:
    if not _is_pair(pair):
        raise TypeError(
            f"mapping[{index}] must be (student_layer, teacher_layer), two integers: "
            f"got {pair!r}; write it as in (1, 2)."
        )
    return pair[0], pair[1]


def _is_pair(pair: Any) -> bool:
    is_pair = isinstance(pair, (tuple, list)) and len(pair) == 2
    return is_pair and not any(isinstance(n, bool) or not isinstance(n, int) for n in pair)


def _check(pairs: LayerPairs, student_layers: int, teacher_layers: int) -> None:
    if not pairs:
        raise ValueError(
            "mapping must hold at least one pair: got an empty list; pass [(student, teacher)]."
        )
    for index, pair in enumerate(pairs):
        sides = (("student", pair[0], student_layers), ("teacher", pair[1], teacher_layers))
        for name, layer, count in sides:
            if not 0 <= layer <= count:
                raise ValueError(
                    f"mapping[{index}] must name a {name} layer from 0 (embeddings) to {count}: "
                    f"got {layer}; the {name} has {count} blocks."
                )
        if pair in pairs[:index]:
            raise ValueError(
                f"mapping must name each pair once: got {pair} twice; drop one, or raise its "
                "weight with pair_weights."
            )
