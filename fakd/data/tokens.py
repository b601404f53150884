"""Texts to token ids, once; and whether two tokenizers do it alike."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .places import cache_folder

_FORMAT = 1  # of what is cached; raise it where the rows that `encode` makes change
_PER_CALL = ("truncation", "padding")  # settings that every call to a tokenizer leaves behind
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
_SPECIAL += ("mask_token",)
# What decides token ids besides the vocabulary, in the order of a tokenizer's own work.
_PARTS = ("normalizer", "pre_tokenizer", "model", "post_processor")


def tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Everything that decides token ids, as JSON would hold it."""
    state = {"vocabulary": tokenizer.get_vocab(), "class": type(tokenizer).__name__}
    state |= {name: getattr(tokenizer, name, None) for name in _SPECIAL}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        parts = json.loads(backend.to_str())
        state |= {name: part for name, part in parts.items() if name not in _PER_CALL}
    return state


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of `tokenizer_state`, the same whatever the tokenizer was used for."""
    return _hash(tokenizer_state(tokenizer))


def check_tokenizers(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> None:
    """Check that student and teacher see the same tokens of every text.

    Raises:
        ValueError: the first difference, in the vocabulary, the special tokens, or the rules.
    """
    first, second = tokenizer_state(ours), tokenizer_state(theirs)
    difference = _vocabulary_difference(first["vocabulary"], second["vocabulary"])
    for name in _SPECIAL:
        if difference is None and first[name] != second[name]:
            difference = f"{name} {first[name]!r} and {second[name]!r}"
    for name in _PARTS:
        if difference is None and first.get(name) != second.get(name):
            kinds = [(state.get(name) or {}).get("type", "none") for state in (first, second)]
            difference = f"a {name} of unlike settings ({kinds[0]} and {kinds[1]})"
    if difference is not None:
        raise ValueError(
            f"student and teacher must have equal tokenizers: got {difference}; choose a student "
            "of the teacher's family, or cut one from the teacher (student.layers)."
        )


def encode_once(
    rows: Dataset, encode: Callable[[dict], dict], settings: dict[str, Any]
) -> tuple[Dataset, str]:
    """`rows.map(encode)`, kept on disk: the second call reads what the first has made.

    The file appears whole or not at all: it is written beside its place and renamed.

    Args:
        rows: the texts alone, no other columns.
        encode: from a batch of rows to columns that replace them.
        settings: all that `encode` depends on, as JSON would hold it.

    Returns:
        The encoded rows, mapped from the file, and their key.
    """
    key = _hash({"format": _FORMAT, "rows": hash_rows(rows), **settings})[:32]
    path = cache_folder() / "tokens" / f"{key}.arrow"
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = rows.map(
        encode,
        batched=True,
        remove_columns=rows.column_names,
        cache_file_name=str(path),
        load_from_cache_file=True,
        # Or else all that `encode` refers to would be pickled for a fingerprint.
        new_fingerprint=key,
        desc="tokenising",
    )
    return encoded, key


def hash_rows(rows: Dataset) -> str:
    """A hash of the contents, wherever they come from."""
    digest = hashlib.sha256(json.dumps(rows.column_names).encode())
    for batch in rows.with_format(None).iter(batch_size=1000):
        digest.update(json.dumps(batch).encode())
    return digest.hexdigest()


def _hash(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True, default=str).encode()).hexdigest()


def _vocabulary_difference(ours: dict[str, int], theirs: dict[str, int]) -> str | None:
    if ours == theirs:
        return None
    if len(ours) != len(theirs):
        return f"{len(ours)} and {len(theirs)} tokens"
    token = next(token for token in sorted(ours, key=ours.get) if theirs.get(token) != ours[token])
    return f"the token {token!r}, which is {ours[token]} and {theirs.get(token, 'absent')}"
