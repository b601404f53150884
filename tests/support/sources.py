"""Data of every kind for `fakd.data.prepare`: files, the hub, caches of their own."""

import datasets
from datasets import Dataset, DatasetDict

from fakd import data
from fakd.config import DataConfig

from .models import tiny_tokenizer


def own_caches(tmp_path, monkeypatch) -> None:
    """Nothing of the user's is read or written."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def prepare(
    source, task: str = "classification", tokenizer=None, order=None, **options
) -> data.Prepared:
    config = DataConfig(str(source), **options)
    return data.prepare(config, task, tokenizer or tiny_tokenizer(), order)


def some_rows(count: int = 60, **columns) -> dict[str, list]:
    rows = {"text": [f"w{i % 50} w{i // 50}" + " w1" * (i % 5) for i in range(count)]}
    return rows | {"label": ["ab"[i % 2] for i in range(count)]} | columns


def write(path, rows: dict[str, list]):
    """A file of the kind that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = Dataset.from_dict(rows)
    if path.suffix in (".csv", ".tsv"):
        rows.to_csv(path, sep="\t" if path.suffix == ".tsv" else ",")
    elif path.suffix == ".parquet":
        rows.to_parquet(path)
    else:
        rows.to_json(path, lines=path.suffix == ".jsonl")
    return path


def on_the_hub(monkeypatch, splits: dict[str, dict], features: dict | None = None) -> list:
    """What `load_dataset` gives from now on; returns the calls."""
    calls = []

    def load_dataset(*arguments, **options):
        calls.append((arguments, options))
        found = DatasetDict({split: Dataset.from_dict(rows) for split, rows in splits.items()})
        for column, feature in (features or {}).items():
            found = found.cast_column(column, feature)
        return found

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls
