"""Data from GLUE and the hub, and what cannot be used."""

import pytest
from datasets import ClassLabel

from fakd import data
from tests.support.models import tiny_tokenizer
from tests.support.sources import on_the_hub, own_caches, prepare, some_rows, write


@pytest.fixture(autouse=True)
def _caches(tmp_path, monkeypatch):
    own_caches(tmp_path, monkeypatch)


GLUE = {
    "cola": (("sentence",), ("matthews_correlation",)),
    "mnli": (("premise", "hypothesis"), ("accuracy",)),
    "mrpc": (("sentence1", "sentence2"), ("accuracy", "f1")),
    "qnli": (("question", "sentence"), ("accuracy",)),
    "qqp": (("question1", "question2"), ("accuracy", "f1")),
    "rte": (("sentence1", "sentence2"), ("accuracy",)),
    "sst2": (("sentence",), ("accuracy",)),
    "stsb": (("sentence1", "sentence2"), ("pearson", "spearmanr")),
    "wnli": (("sentence1", "sentence2"), ("accuracy",)),
}


@pytest.mark.parametrize("task", GLUE)
def test_glue(monkeypatch, task):
    columns, metrics = GLUE[task]
    splits = ["validation"] if task != "mnli" else ["validation_matched", "validation_mismatched"]

    def rows(count: int, labels: list) -> dict:
        texts = {column: [f"w{i} w{i + 1}" for i in range(count)] for column in columns}
        return texts | {"label": [labels[i % len(labels)] for i in range(count)]}

    labels = [0.5, 1.5, 4.0] if task == "stsb" else [0, 1]
    hub = {"train": rows(12, labels)} | {split: rows(6, labels) for split in splits}
    hub["test"] = rows(4, [-1.0] if task == "stsb" else [-1])  # GLUE hides them
    features = {} if task == "stsb" else {"label": ClassLabel(names=["no", "yes"])}
    calls = on_the_hub(monkeypatch, hub, features)
    found = prepare(f"glue/{task}")
    assert calls == [(("nyu-mll/glue",), {"name": task})]
    assert set(data.GLUE_TASKS) == set(GLUE)
    assert found.metrics == metrics
    assert found.labels == (None if task == "stsb" else ["no", "yes"])
    assert (len(found.train), len(found.test)) == (12, 6)
    assert list(found.more_tests) == splits[1:]
    # [CLS], the words of each text, [SEP]: the tiny template joins pairs as they are.
    assert (
        data.lengths(found.train).tolist()
        == [len(tiny_tokenizer()(*["w1 w2"] * len(columns)).input_ids)] * 12
    )
    if task != "stsb":
        with pytest.raises(ValueError, match=r"'test' must have no class .* got '\(hidden\)'"):
            prepare(f"glue/{task}", test_split="test")


def test_the_hub(monkeypatch):
    rows = some_rows(12)
    rows["body"] = rows.pop("text")
    calls = on_the_hub(monkeypatch, {"train": rows, "test": rows})
    found = prepare("someone/news", name="small", text="body")
    assert calls == [(("someone/news",), {"name": "small"})]
    assert (found.name, len(found.test)) == ("someone/news", 12)


@pytest.mark.parametrize("source", ["someone/news", "glue/sst2", "r9"])
def test_offline(source):
    with pytest.raises(ValueError, match=rf"can be read: got '{source}' \(.*connect to the hub"):
        prepare(source)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"text": "txt"},
            r"data\.text must be a column .*: got 'txt'; did you mean 'text'\? there",
        ),
        ({"text_pair": "b"}, r"data\.text_pair .*: got 'b'; there are 'text', 'label', 'number'"),
        ({"label": "labels"}, r"data\.label .*: got 'labels'; did you mean 'label'\?"),
        ({"text": "number"}, r"data\.text must be a column of text: got 'number' of Value"),
        ({"train_split": "trian"}, r"data\.train_split .* got 'trian'; did you mean 'train'\?"),
    ],
)
def test_missing_columns_and_splits(tmp_path, options, match):
    path = write(tmp_path / "mine.csv", some_rows(number=list(range(60))))
    with pytest.raises(ValueError, match=match):
        prepare(path, **options)


def test_no_column_of_a_usual_name(tmp_path):
    rows = some_rows()
    rows["sentences"] = rows.pop("text")
    with pytest.raises(ValueError, match=r"data\.text must be .*: got 'text'; .* 'sentences'"):
        prepare(write(tmp_path / "mine.csv", rows))
    rows["sentence"] = rows.pop("sentences")
    prepare(write(tmp_path / "other.csv", rows))


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="must be a file or folder that exists: got"):
        prepare(tmp_path / "no.csv")
    with pytest.raises(ValueError, match="got 'glue/mnl'; did you mean glue/'mnli'"):
        prepare("glue/mnl")
    with pytest.raises(ValueError, match=r"files of one kind of \.csv.*: got none in"):
        prepare(tmp_path)
    write(tmp_path / "a.csv", some_rows())
    write(tmp_path / "b.jsonl", some_rows())
    with pytest.raises(ValueError, match=r"files of one kind .*: got \.csv, \.jsonl in"):
        prepare(tmp_path)
    write(tmp_path / "tables" / "a.csv", some_rows())
    write(tmp_path / "tables" / "b.tsv", some_rows())
    with pytest.raises(ValueError, match=r"files of one kind .*: got \.csv, \.tsv in"):
        prepare(tmp_path / "tables")


def test_broken_and_empty_files(tmp_path):
    (tmp_path / "a.json").write_text('{"text": "w1", "label"')
    with pytest.raises(ValueError, match=r"data set that can be read: got .*a\.json' \("):
        prepare(tmp_path / "a.json")
    (tmp_path / "b.csv").write_text("")
    with pytest.raises(ValueError, match="must hold rows: got empty files"):
        prepare(tmp_path / "b.csv")
    (tmp_path / "c.csv").write_text("text,label\n,\n")
    with pytest.raises(ValueError, match="c must have rows to train on: got none with text and la"):
        prepare(tmp_path / "c.csv")
    (tmp_path / "d.csv").write_text("text,label\n")
    with pytest.raises(ValueError, match=r"can be read: got .*d\.csv' \(.* no data"):
        prepare(tmp_path / "d.csv")


def test_a_csv_may_have_semicolons(tmp_path):
    lines = [f"w{i % 50} w{i // 50}, w3;{'ab'[i % 2]}" for i in range(60)]
    (tmp_path / "mine.csv").write_text("\n".join(["text;label", *lines]))
    found = prepare(tmp_path / "mine.csv")
    assert (found.labels, len(found.train) + len(found.test)) == (["a", "b"], 60)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.txt", "folder/a.csv"])
def test_another_encoding_is_named(tmp_path, name):
    path = tmp_path / "mine" / name
    path.parent.mkdir(parents=True)
    path.write_bytes('text,label\n"caf\xe9",a\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"text in UTF-8: got .*mine/{name}, which .* iconv"):
        prepare(tmp_path / "mine", "causal_lm")


def test_unusable_labels(tmp_path):
    path = write(tmp_path / "one.csv", some_rows(label=["a"] * 60))
    with pytest.raises(ValueError, match=r"one must have at least two classes: got \['a'\]"):
        prepare(path)
    write(tmp_path / "split" / "train.csv", some_rows())
    write(tmp_path / "split" / "test.csv", some_rows(label=["c"] * 60))
    with pytest.raises(
        ValueError, match=r"'test' must have no class but those .* got 'c' in label"
    ):
        prepare(tmp_path / "split")
    for number, labels in enumerate([["a"], {"is": "a"}]):
        path = write(tmp_path / f"many{number}.jsonl", some_rows(label=[labels] * 60))
        with pytest.raises(ValueError, match=r"one text or one number .*: got 'label' of .*; choo"):
            prepare(path)
    path = write(tmp_path / "inf.csv", some_rows(label=[0.5] * 59 + [float("inf")]))
    with pytest.raises(ValueError, match="label must be finite in the split"):
        prepare(path)
