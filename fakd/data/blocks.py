"""Blocks of equal length for language models: each of one text, or packed with several."""

from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .labelled import IGNORED_LABEL


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Each text whole, without special tokens."""
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    return tokenizer(list(texts), **options)["input_ids"]


def cut_blocks(documents: Iterable[Sequence[int]], tokens: int) -> list[list[int]]:
    """Blocks of one document each; what is left at its end is dropped, so nothing is padded."""
    return [
        list(ids[start : start + tokens])
        for ids in documents
        for start in range(0, len(ids) - tokens + 1, tokens)
    ]


def pack(documents: Iterable[Sequence[int]], tokens: int) -> dict[str, list[list[int]]]:
    """Fill blocks with documents, end to end; what is left after the last full block is dropped.

    A document that a block cannot hold goes on in the next one, as a new document: nothing is
    carried across a border of blocks.

    Args:
        documents: token ids of each.
        tokens: of each block.

    Returns:
        Rows of equal length: `input_ids`, and `position_ids` that restart from 0 at each document.
        Those alone make the causal LMs of transformers keep documents apart, see `causal_labels`.
    """
    documents = list(documents)
    lengths = np.array([len(ids) for ids in documents], dtype=np.int64)
    flat = np.fromiter(chain.from_iterable(documents), dtype=np.int64, count=lengths.sum())
    place = np.arange(len(flat))
    document_start = np.repeat(lengths.cumsum() - lengths, lengths)
    block_start = place // tokens * tokens
    positions = place - np.maximum(document_start, block_start)
    whole = len(flat) // tokens * tokens
    return {
        "input_ids": flat[:whole].reshape(-1, tokens).tolist(),
        "position_ids": positions[:whole].reshape(-1, tokens).tolist(),
    }


def causal_labels(input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """What a causal LM learns from blocks: their own tokens, borders left out.

    Transformers shifts labels itself, so the label of a document's first token is what the last
    token of the document before would have to guess: it is ignored.

    Args:
        input_ids: [B, T].
        position_ids: [B, T], 0 at the first token of each document; None for one document a row.

    Returns:
        [B, T].
    """
    if position_ids is None:
        return input_ids.clone()
    return input_ids.masked_fill(position_ids == 0, IGNORED_LABEL)


def spread_indices(total: int, count: int) -> list[int]:
    """`count` of the indices below `total` at even distances, or all where there are fewer."""
    count = min(count, total)
    return [index * total // count for index in range(count)]
