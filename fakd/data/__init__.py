"""Texts from anywhere: read, checked, tokenised once, planned into steps."""

from .batching import collate, mixed_batches, plan, split
from .blocks import causal_labels, cut_blocks, pack, spread_indices, token_ids
from .labelled import IGNORED_LABEL, SOURCES, TextData, hide_labels, load, read_table
from .places import cache_folder, package_file
from .prepared import Prepared, lengths, prepare, prepare_test
from .sources import GLUE_TASKS
from .texts import Corpus, load_corpus
from .tokens import check_tokenizers, tokenizer_hash

__all__ = [
    "GLUE_TASKS",
    "IGNORED_LABEL",
    "SOURCES",
    "Corpus",
    "Prepared",
    "TextData",
    "cache_folder",
    "causal_labels",
    "check_tokenizers",
    "collate",
    "cut_blocks",
    "hide_labels",
    "lengths",
    "load",
    "load_corpus",
    "mixed_batches",
    "pack",
    "package_file",
    "plan",
    "prepare",
    "prepare_test",
    "read_table",
    "split",
    "spread_indices",
    "token_ids",
    "tokenizer_hash",
]
